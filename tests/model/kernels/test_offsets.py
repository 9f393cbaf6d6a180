"""Offsets, positions and sampling in one, against the steps of the layer in float64."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention import DeformableAttention, DeformableAttentionPP, sample_features
from model.config import DatConfig, Family, StageConfig
from model.kernels.offsets import sample_keys
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples

pytestmark = pytest.mark.slow

KINDS: dict[Family, type[DeformableAttention]] = {
    "dat": DeformableAttention,
    "dat_pp": DeformableAttentionPP,
}


def make_layer(family, size, *, groups, channels, kernel=3, stride=1, dtype=torch.float32, seed=0):
    """A layer with parameters rounded to `dtype`, but kept in float32."""
    spec = StageConfig("D", groups * channels, groups, groups, stride, kernel)
    config = DatConfig("test", family, (spec,), (36, 36), 36, window=1)
    layer, random = KINDS[family](config, 0), generator(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    # Offsets of half a map, of which some leave it.
    layer.offset_conv.weight.data /= kernel
    layer.offset_proj.weight.data *= 0.5 * channels**-0.5
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype).float()
    layer.fit(size)
    return layer.to(DEVICE).requires_grad_(False)


def maps(layer, batch, *, dtype=torch.float32, seed=0):
    """Tokens and queries, rounded to `dtype`."""
    random = generator(seed)
    shape = (batch, *layer.size, layer.q.in_features)
    return [torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(2)]


def sampled(layer, tokens, queries):
    """By the kernel, with parameters in the dtype of the tokens."""
    network = deepcopy(layer).to(tokens.dtype)
    return sample_keys(
        tokens,
        queries,
        network.offset_conv,
        network.offset_norm,
        network.offset_proj,
        layer.reference_points,
        layer.reach if type(layer) is DeformableAttention else None,
    )


def reference(layer, tokens, queries):
    """Features and locations, in float64."""
    layer = deepcopy(layer).double()
    locations = layer.move(layer._offsets(queries.double()))
    return sample_features(tokens.double(), locations), locations


def check(layer, tokens, queries):
    features, locations = sampled(layer, tokens, queries)
    exact_features, exact_locations = reference(layer, tokens, queries)
    assert features.dtype == tokens.dtype
    assert locations.dtype == torch.float32
    assert_close(locations, exact_locations)
    assert_close(features, exact_features)


@given(
    family=st.sampled_from(("dat", "dat_pp")),
    size=st.tuples(st.integers(4, 7), st.integers(4, 7)),
    groups=st.integers(1, 3),
    channels=st.sampled_from((3, 8, 20)),
    kernel=st.sampled_from((1, 3, 5)),
    stride=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_layer(*, family, size, dtype, seed, **shape):
    layer = make_layer(family, size, dtype=dtype, seed=seed, **shape)
    check(layer, *maps(layer, 2, dtype=dtype, seed=seed))


@pytest.mark.parametrize(
    ("family", "channels", "kernel", "stride"),
    [
        ("dat", 128, 5, 1),
        ("dat", 128, 3, 1),
        ("dat_pp", 64, 9, 8),
        ("dat_pp", 64, 7, 4),
        ("dat_pp", 96, 9, 8),
        ("dat_pp", 96, 7, 4),
        ("dat_pp", 128, 5, 2),
        ("dat_pp", 128, 3, 1),
    ],
)
def test_published_layers(family, channels, kernel, stride):
    """Of one group, with keys for two blocks, the second not full."""
    size = (5 * stride - stride // 2, 4 * stride)
    layer = make_layer(family, size, groups=1, channels=channels, kernel=kernel, stride=stride)
    check(layer, *maps(layer, 1))


@pytest.mark.parametrize("family", KINDS)
def test_offsets_far_beyond_their_reach(family):
    layer = make_layer(family, (4, 4), groups=2, channels=16)
    layer.offset_proj.weight.mul_(1e3)
    tokens, queries = maps(layer, 1)
    check(layer, tokens, queries)
    _, locations = sampled(layer, tokens, queries)
    if family == "dat_pp":
        assert locations.abs().max() == 1
    else:
        moved = (locations - layer.reference_points).abs() / layer.reach
        torch.testing.assert_close(moved.max(), torch.ones_like(moved).max())


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("broken", [0, 1], ids=["tokens", "queries"])
def test_what_is_no_number_stays_where_torch_has_it(family, broken):
    layer = make_layer(family, (4, 4), groups=2, channels=16)
    inputs = maps(layer, 2)
    inputs[broken][0, 2, 2, 3] = torch.nan
    check(layer, *inputs)
    features, _ = sampled(layer, *inputs)
    assert features[0].isnan().any()
    assert not features[1].isnan().any()
