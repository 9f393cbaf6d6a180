"""Attention with the bias in registers, against the bias and the softmax of torch in float64."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model import VARIANTS
from model.attention import DeformableAttention, DeformableAttentionPP, relative_position_bias
from model.config import DatConfig
from model.kernels.deformable_attention import attend
from tests.model.kernels.conftest import DEVICE, assert_close, generator, some_examples


def reference(queries, keys_values, *geometry):
    table, *_ = geometry
    q, k, v = (
        part.double().unflatten(-1, (len(table), -1)).transpose(1, 2)
        for part in (queries, *keys_values.chunk(2, -1))
    )
    bias = relative_position_bias(*(tensor.double() for tensor in geometry))
    attended = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    return attended.transpose(1, 2).flatten(2)


def features(locations, heads, head_dim, queries, *, dtype=torch.float32, seed=0):
    """Queries and keys with values for these locations."""
    random, (B, _, Hk, Wk, _) = generator(seed), locations.shape
    q = torch.randn(B, queries, heads * head_dim, generator=random) * head_dim**-0.5
    kv = torch.randn(B, Hk * Wk, 2 * heads * head_dim, generator=random)
    return q.to(DEVICE, dtype), kv.to(DEVICE, dtype)


SIDES = st.integers(1, 9)


@given(
    size=st.tuples(SIDES, SIDES),
    table_size=st.tuples(SIDES, SIDES),
    key_size=st.tuples(st.integers(1, 5), SIDES),
    groups=st.integers(1, 2),
    heads_of_group=st.integers(1, 2),
    head_dim=st.sampled_from((3, 16, 32)),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_attention_is_softmax_with_the_bias_of_the_table(
    *, size, table_size, key_size, groups, heads_of_group, head_dim, seed
):
    random, heads = generator(seed), groups * heads_of_group
    table = torch.randn(heads, *table_size, generator=random)
    rows, columns = (torch.empty(n).uniform_(-1.2, 1.2, generator=random) for n in size)
    locations = torch.empty(2, groups, *key_size, 2).uniform_(-1.6, 1.6, generator=random)
    geometry = [tensor.to(DEVICE) for tensor in (table, rows, columns, locations)]
    inputs = features(locations, heads, head_dim, size[0] * size[1], seed=seed)

    assert_close(attend(*inputs, *geometry), reference(*inputs, *geometry))


def published_layers() -> Iterator[tuple[DatConfig, int]]:
    """Each different shape of a deformable layer once, that of a detector among them."""
    detector = VARIANTS["dat_pp_tiny_224"].resized((800, 1344))
    seen = set()
    for config in (*VARIANTS.values(), replace(detector, name="detector")):
        for stage, spec in enumerate(config.stages):
            if "D" not in spec.blocks:
                continue
            heads = spec.heads // spec.offset_groups
            tables = config.map_size(stage, (config.table_size,) * 2)
            shape = (config.family, config.map_size(stage), spec.offset_stride, heads, tables)
            if shape not in seen:
                seen.add(shape)
                yield config, stage


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        pytest.param(
            config,
            stage,
            id=f"{config.name}-{stage}",
            marks=[] if "tiny" in config.name else pytest.mark.slow,
        )
        for config, stage in published_layers()
    ],
)
def test_published_layers(config, stage):
    """Of one group: all keys, and so many queries from the end that they take two blocks."""
    spec = config.stages[stage]
    kind = DeformableAttention if config.family == "dat" else DeformableAttentionPP
    (H, W), heads = config.map_size(stage), spec.heads // spec.offset_groups
    tables = config.map_size(stage, (config.table_size,) * 2)
    random = generator()
    table = torch.randn(heads, *(2 * side - 1 for side in tables), generator=random)
    columns = kind.query_axis(W)[-72:]
    rows = kind.query_axis(H)[-72 // len(columns) :]
    points = torch.stack(
        torch.meshgrid(
            *(kind.reference_axis(-(-side // spec.offset_stride)) for side in (H, W)),
            indexing="ij",
        ),
        -1,
    )
    locations = points + torch.randn(1, 1, *points.shape, generator=random) * 0.1
    if config.family == "dat_pp":
        locations = locations.clamp(-1, 1)
    geometry = [tensor.to(DEVICE).contiguous() for tensor in (table, rows, columns, locations)]
    inputs = features(locations, heads, spec.dim // spec.heads, len(rows) * len(columns))

    assert_close(attend(*inputs, *geometry), reference(*inputs, *geometry))


def test_borders_of_the_table():
    """Displacements onto its border cells, within a cell of them, and beyond."""
    axis = torch.linspace(-1, 1, 5)
    places = torch.tensor([-4.0, -1.5, -1.0, -1.0 + 2**-20, 0.0, 1.0 - 2**-20, 1.0, 1.5, 4.0])
    locations = torch.stack(torch.meshgrid(places, places, indexing="ij"), -1)[None, None]
    table = torch.randn(1, 9, 9, generator=generator())
    geometry = [tensor.to(DEVICE) for tensor in (table, axis, axis, locations)]
    queries, keys_values = features(locations, 1, 16, 25)

    attended = attend(torch.zeros_like(queries), keys_values, *geometry)

    exact = reference(torch.zeros_like(queries), keys_values, *geometry)
    torch.testing.assert_close(attended.double(), exact, rtol=0, atol=1e-5)


def test_logits_of_any_size_have_a_softmax():
    locations = torch.zeros(1, 1, 5, 9, 2)
    axis = torch.zeros(1)
    geometry = [tensor.to(DEVICE) for tensor in (torch.zeros(1, 1, 1), axis, axis, locations)]
    queries, keys_values = features(locations, 1, 16, 1)
    inputs = (queries * 1e3, keys_values)
    assert_close(attend(*inputs, *geometry), reference(*inputs, *geometry))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # the interpreter's maximum
@pytest.mark.parametrize("broken", ["queries", "keys", "locations"])
def test_what_is_no_number_stays_in_its_image(broken):
    locations = torch.rand(2, 1, 6, 6, 2, generator=generator()) * 2 - 1
    axis = torch.linspace(-1, 1, 4)
    table = torch.randn(2, 7, 7, generator=generator())
    queries, keys_values = features(locations, 2, 16, 16)
    geometry = [tensor.to(DEVICE) for tensor in (table, axis, axis)]
    locations = locations.to(DEVICE)
    whole = attend(queries, keys_values, *geometry, locations)
    {"queries": queries, "keys": keys_values, "locations": locations}[broken][0] = torch.nan

    attended = attend(queries, keys_values, *geometry, locations)

    assert attended[0].isnan().all()
    assert attended[1].equal(whole[1])


@pytest.mark.gpu
def test_the_map_of_a_detector_takes_no_memory_but_the_output():
    locations = torch.rand(1, 1, 25, 42, 2, generator=generator()) * 2 - 1
    rows, columns = (DeformableAttentionPP.query_axis(side) for side in (200, 336))
    table = torch.randn(2, 111, 111, generator=generator())
    geometry = [tensor.to(DEVICE) for tensor in (table, rows, columns, locations)]
    queries, keys_values = features(locations, 2, 32, 67200)
    attend(queries, keys_values, *geometry)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    attended = attend(queries, keys_values, *geometry)

    assert torch.cuda.max_memory_allocated() - before < 1.1 * attended.nbytes
    geometry[1] = geometry[1][-2:]
    exact = reference(queries[:, -672:], keys_values, *geometry)
    assert_close(attended[:, -672:], exact)
