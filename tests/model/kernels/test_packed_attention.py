"""Attention with the packed table, against the bias and the softmax of torch in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import VARIANTS
from model.attention import DeformableAttention, DeformableAttentionPP
from model.dat import make_attention
from model.kernels.packed_attention import attend, pack
from tests.model.kernels.conftest import DEVICE, generator, some_examples
from tests.model.kernels.test_deformable_attention import features, reference

SIDES = st.integers(1, 9)


def assert_within_rounding(attended, exact):
    """The table is rounded to 8 bits: of a logit of a few units, up to a hundredth."""
    torch.testing.assert_close(attended.double(), exact, rtol=0.02, atol=0.03)


@given(
    size=st.tuples(SIDES, SIDES),
    table_size=st.tuples(SIDES, SIDES),
    key_size=st.tuples(st.integers(1, 5), SIDES),
    groups=st.integers(1, 2),
    head_dim=st.sampled_from((3, 16, 32)),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_attention_is_softmax_with_the_bias_of_the_table(
    *, size, table_size, key_size, groups, head_dim, seed
):
    random, heads = generator(seed), 2 * groups
    table = torch.randn(heads, *table_size, generator=random)
    rows, columns = (torch.empty(n).uniform_(-1.2, 1.2, generator=random) for n in size)
    locations = torch.empty(2, groups, *key_size, 2).uniform_(-1.6, 1.6, generator=random)
    table, *geometry = (tensor.to(DEVICE) for tensor in (table, rows, columns, locations))
    cells = size[0] * size[1]
    inputs = features(locations, heads, head_dim, cells, dtype=torch.float16, seed=seed)

    attended = attend(*inputs, pack(table), *geometry)

    assert_within_rounding(attended, reference(*inputs, table, *geometry))


@pytest.mark.parametrize(("kind", "spread"), [("fits", 1.0), ("free", 1.0), ("free", 1.05)])
@pytest.mark.parametrize("size", [(2, 3), (7, 7), (5, 12)])
def test_without_clamping_inside_the_table(kind, spread, size):
    """Positions of DAT++ at the size of its table, and all that are less than a cell outside."""
    random = generator()
    axes = [DeformableAttentionPP.query_axis(side).to(DEVICE) for side in size]
    table = torch.randn(2, *(2 * side - 1 for side in size), generator=random).to(DEVICE)
    locations = torch.empty(2, 1, 5, 9, 2).uniform_(-spread, spread, generator=random)
    locations[:, :, 0, :3], locations[:, :, 0, 3:6] = -spread, spread
    inputs = features(locations, 2, 16, size[0] * size[1], dtype=torch.float16)
    geometry = (*axes, locations.to(DEVICE))

    attended = attend(*inputs, pack(table), *geometry, clamped=False, fits=kind == "fits")

    assert_within_rounding(attended, reference(*inputs, table, *geometry))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # the interpreter's maximum
@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("fits", [True, False])
def test_what_is_no_number_stays_in_its_image(clamped, fits):
    locations = torch.rand(2, 1, 6, 6, 2, generator=generator()) * 2 - 1
    locations[0] = torch.nan
    axis = torch.linspace(-1, 1, 4).to(DEVICE)
    table = torch.randn(2, 7, 7, generator=generator()).to(DEVICE)
    inputs = features(locations, 2, 16, 16, dtype=torch.float16)
    geometry = (axis, axis, locations.to(DEVICE))

    attended = attend(*inputs, pack(table), *geometry, clamped=clamped, fits=fits)

    assert attended[0].isnan().all()
    assert_within_rounding(attended[1], reference(*inputs, table, *geometry)[1])


def test_a_table_is_packed_again_when_its_weights_change():
    layer = make_attention(VARIANTS["dat_tiny_224"], 3, "D").to(DEVICE)
    assert isinstance(layer, DeformableAttention)
    first = layer.packed_table()
    assert layer.packed_table() is first
    weights = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(weights)
    assert layer.packed_table().equal(pack(layer.relative_position_bias_table))
    assert not layer.packed_table().equal(first)
