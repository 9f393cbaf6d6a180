"""Attention by tiles, against the layers that gather them, in float64."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import DatConfig, StageConfig
from model.kernels.local_attention import attend_in_tiles
from model.local_attention import NeighborhoodAttention, WindowAttention
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples


def make_layer(kind, size, window, *, heads=2, head_dim=16, seed=0):
    """A layer of a kind, `W`, `S` or `N`, on a map of this size."""
    spec = StageConfig("L", heads * head_dim, heads)
    family = "dat_pp" if kind == "N" else "dat"
    side = 4 * size[0] if family == "dat" else 36
    config = DatConfig("test", family, (spec,), (side, side), side, window=window)
    layer = (
        NeighborhoodAttention(config, 0)
        if kind == "N"
        else WindowAttention(config, 0, shifted=kind == "S")
    )
    if kind == "N":
        layer.fit(size)
    layer.relative_position_bias_table.data.normal_(generator=generator(seed))
    return layer.requires_grad_(False).eval().to(DEVICE)


def make_qkv(layer, size, *, batch=1, dtype=torch.float32, seed=0):
    C = layer.proj.in_features
    qkv = torch.randn(batch, size[0] * size[1], 3 * C, generator=generator(seed))
    qkv[..., :C] *= (C // layer.heads) ** -0.5
    return qkv.to(DEVICE, dtype)


def tiles(layer):
    """Cells of the queries and of the keys of each tile."""
    if isinstance(layer, NeighborhoodAttention):
        return layer.query_index, layer.key_index
    windows = layer.order.view(-1, layer.window**2)
    return windows, windows


def reference(layer, qkv):
    layer, (queries, keys) = deepcopy(layer).double(), tiles(layer)
    gathered = [
        part[:, index]  # (B, tiles, queries or keys, C)
        for part, index in zip(qkv.double().chunk(3, -1), (queries, keys, keys), strict=True)
    ]
    return layer.attend(*gathered).index_select(1, layer.place)


@given(
    kind=st.sampled_from("WSN"),
    window=st.sampled_from((3, 4, 5)),
    windows=st.integers(2, 3),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from((3, 16)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_layer(*, kind, window, windows, more, heads, head_dim, dtype, seed):
    side = window * windows
    size = (side + more[0], side + more[1]) if kind == "N" else (side, side)
    layer = make_layer(kind, size, window, heads=heads, head_dim=head_dim, seed=seed)
    qkv = make_qkv(layer, size, batch=2, dtype=dtype, seed=seed)

    out = layer.attend_by_index(qkv, *tiles(layer))

    assert out.dtype == dtype
    assert_close(out, reference(layer, qkv))


@pytest.mark.parametrize(
    ("kind", "size", "window", "heads"),
    [
        pytest.param("S", (14, 14), 7, 3, id="dat"),
        pytest.param("S", (24, 24), 12, 1, id="dat_base_384"),
        pytest.param("N", (28, 28), 7, 1, id="dat_pp"),
        pytest.param("N", (14, 14), 7, 2, id="dat_pp-2"),
        pytest.param("N", (25, 42), 7, 1, id="detector"),
    ],
)
def test_published_windows(kind, size, window, heads):
    layer = make_layer(kind, size, window, heads=heads, head_dim=32)
    qkv = make_qkv(layer, size)
    assert_close(layer.attend_by_index(qkv, *tiles(layer)), reference(layer, qkv))


def test_tiles_of_a_kind_share_their_bias():
    size = (25, 28)
    layer = make_layer("N", size, 3, heads=1)
    assert 1 < len(layer.laid_out_bias) < len(layer.query_index)
    qkv = make_qkv(layer, size)
    assert_close(layer.attend_by_index(qkv, *tiles(layer)), reference(layer, qkv))


def test_a_cell_of_two_tiles_is_answered_by_the_one_of_its_place():
    """Both hold all four cells; one attends to the first two, the other one to the last two."""
    cells = torch.arange(4, device=DEVICE)
    values = torch.tensor([1.0, 1.0, 2.0, 2.0], device=DEVICE)
    qkv = torch.zeros(1, 4, 3 * 16, device=DEVICE)
    qkv[..., 32:] = values[:, None]
    for place, expected in (([0, 1, 6, 7], [1, 1, 2, 2]), ([4, 5, 2, 3], [2, 2, 1, 1])):
        answers = attend_in_tiles(
            qkv,
            torch.zeros(1, 1, 4, 2, device=DEVICE),
            torch.zeros(2, dtype=torch.int64, device=DEVICE),
            cells.expand(2, 4).contiguous(),
            cells.view(2, 2),
            torch.tensor(place, device=DEVICE),
        )
        assert answers[0, :, 0].tolist() == expected


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # the interpreter's maximum
@pytest.mark.parametrize("kind", ["S", "N"])
def test_what_is_no_number_stays_where_torch_has_it(kind):
    layer = make_layer(kind, (9, 9), 3)
    qkv = make_qkv(layer, (9, 9), batch=2)
    qkv[0, 40, 3] = torch.nan  # a query
    qkv[0, 70, -1] = torch.nan  # a value
    out = layer.attend_by_index(qkv, *tiles(layer))
    assert_close(out, reference(layer, qkv))
    assert out[0].isnan().any()
    assert not out[1].isnan().any()
