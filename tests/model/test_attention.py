"""The attention against slow oracles and against `grid_sample`, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DAT, VARIANTS
from model.attention import (
    DeformableAttention,
    DeformableAttentionPP,
    relative_position_bias,
    relative_position_bias_by_slices,
    sample_features,
)
from model.config import DatConfig, Family, StageConfig
from model.local_attention import NeighborhoodAttention, WindowAttention
from tests.conftest import SMALL_DAT

SIDES = st.integers(1, 9)


@given(SIDES, SIDES, st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_sampling_is_grid_sample_with_zeros_outside(H, W, points, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, H, W, groups * 3, dtype=torch.float64, generator=generator)
    locations = torch.empty(2, groups, points, 2, 2, dtype=torch.float64)
    locations.uniform_(-1.6, 1.6, generator=generator)
    locations[0, 0, 0] = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])  # on the border itself

    ours = sample_features(tokens, locations)

    maps = tokens.view(2, H, W, groups, 3).permute(0, 3, 4, 1, 2).reshape(2 * groups, 3, H, W)
    grid = locations.flip(-1).reshape(2 * groups, points, 2, 2)
    expected = F.grid_sample(maps, grid, align_corners=True)
    expected = expected.view(2, groups * 3, points * 2).transpose(1, 2)
    torch.testing.assert_close(ours, expected)


def test_sampling_reads_the_cell_between_cells_as_their_mean():
    tokens = torch.arange(6.0).view(1, 2, 3, 1)
    middle = torch.zeros(1, 1, 1, 1, 2)
    assert sample_features(tokens, middle).item() == 2.5


def bias_oracle(table, query_rows, query_columns, locations):
    """Nested loops over queries, keys and table cells."""
    heads, TH, TW = table.shape
    groups, keys = locations.shape[0], locations.shape[1]
    out = torch.zeros(heads, len(query_rows) * len(query_columns), keys, dtype=table.dtype)
    for head in range(heads):
        group = head // (heads // groups)
        for query, (row, column) in enumerate(
            (r, c) for r in query_rows.tolist() for c in query_columns.tolist()
        ):
            for key in range(keys):
                y = ((row - locations[group, key, 0].item()) / 2 + 1) * (TH - 1) / 2
                x = ((column - locations[group, key, 1].item()) / 2 + 1) * (TW - 1) / 2
                for ty in (math.floor(y), math.floor(y) + 1):
                    for tx in (math.floor(x), math.floor(x) + 1):
                        if 0 <= ty < TH and 0 <= tx < TW:
                            weight = (1 - abs(y - ty)) * (1 - abs(x - tx))
                            out[head, query, key] += weight * table[head, ty, tx]
    return out


@given(st.integers(2, 4), st.integers(2, 5), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_bias_is_the_table_read_at_halved_displacements(H, W, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4, 2 * H - 1, 2 * W - 1, dtype=torch.float64, generator=generator)
    locations = torch.empty(1, 2, 2, 2, 2, dtype=torch.float64)
    locations.uniform_(-1.4, 1.4, generator=generator)
    rows, columns = (DeformableAttention.query_axis(n).double() for n in (H, W))
    ours = relative_position_bias(table, rows, columns, locations)[0]
    expected = bias_oracle(table, rows, columns, locations[0].flatten(1, 2))
    torch.testing.assert_close(ours, expected)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_slices_of_the_table_give_the_same_bias(H, W, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(4, 2 * H - 1, 2 * W - 1, dtype=torch.float64, generator=generator)
    locations = torch.empty(2, 2, 3, 2, 2, dtype=torch.float64)
    locations.uniform_(-1.3, 1.3, generator=generator).clamp_(-1, 1)
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (H, W))
    ours = relative_position_bias_by_slices(table, (H, W), locations)
    torch.testing.assert_close(ours, relative_position_bias(table, rows, columns, locations))


def config(family: Family, size: tuple[int, int], blocks: str, window: int) -> DatConfig:
    stage = StageConfig(blocks, 8, 2, 2, 1, 3)
    return DatConfig("test", family, (stage,), size, size[0], 3, window)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def local_oracle(attention, tokens, neighbours):
    """Attention of each query to the keys and biases that `neighbours(y, x)` names."""
    _, H, W, C = tokens.shape
    q, k, v = attention.qkv(tokens)[0].split(C, -1)
    d = C // attention.heads
    out = torch.zeros(H, W, C, dtype=tokens.dtype)
    for y in range(H):
        for x in range(W):
            keys = list(neighbours(y, x))
            for head in range(attention.heads):
                part = slice(head * d, (head + 1) * d)
                logits = torch.stack(
                    [q[y, x, part] @ k[ky, kx, part] + bias[head] for ky, kx, bias in keys]
                )
                values = torch.stack([v[ky, kx, part] for ky, kx, _ in keys])
                out[y, x, part] = logits.softmax(0) @ values
    return attention.proj(out)[None]


@pytest.mark.parametrize("size", [(9, 9), (10, 13), (9, 21), (14, 11)])
def test_neighbourhoods_are_whole_and_move_inwards_at_borders(size):
    H, W = size
    attention = NeighborhoodAttention(config("dat_pp", (4 * H, 4 * W), "N", 7), 0)
    attention = randomised(attention)
    tokens = torch.randn(1, H, W, 8, dtype=torch.float64)
    table = attention.relative_position_bias_table

    def neighbours(y, x):
        top, left = min(max(y - 3, 0), H - 7), min(max(x - 3, 0), W - 7)
        for ky in range(top, top + 7):
            for kx in range(left, left + 7):
                yield ky, kx, table[:, ky - y + 6, kx - x + 6]

    with torch.no_grad():
        torch.testing.assert_close(
            attention(tokens, torch.zeros_like(tokens)).stream.sum(),
            local_oracle(attention, tokens, neighbours),
        )


def test_a_map_smaller_than_the_neighbourhood_is_padded_with_zero_tokens():
    attention = randomised(NeighborhoodAttention(config("dat_pp", (36, 40), "N", 11), 0))
    tokens = torch.randn(1, 9, 10, 8, dtype=torch.float64)
    whole = randomised(NeighborhoodAttention(config("dat_pp", (44, 44), "N", 11), 0))
    with torch.no_grad():
        padded = F.pad(tokens, (0, 0, 0, 1, 0, 2))
        expected = whole(padded, torch.zeros_like(padded)).stream.sum()[:, :9, :10]
        torch.testing.assert_close(
            attention(tokens, torch.zeros_like(tokens)).stream.sum(), expected
        )


@pytest.mark.parametrize(("window", "shifted"), [(4, False), (4, True), (3, True)])
def test_windows_and_their_shift(window, shifted):
    side = 3 * window
    attention = WindowAttention(
        config("dat", (4 * side, 4 * side), "S", window), 0, shifted=shifted
    )
    attention = randomised(attention)
    tokens = torch.randn(1, side, side, 8, dtype=torch.float64)
    shift = math.ceil(window / 2) if shifted else 0
    table = attention.relative_position_bias_table

    def band(i):
        """Part of the shifted axis: keys of another part are seen less by 100."""
        return 0 if i < side - window else 1 if i < side - shift else 2

    def neighbours(y, x):
        # In the rolled map, cell i holds what was at i + shift.
        ry, rx = (y - shift) % side, (x - shift) % side
        for ky in range(ry - ry % window, ry - ry % window + window):
            for kx in range(rx - rx % window, rx - rx % window + window):
                apart = shifted and (band(ky), band(kx)) != (band(ry), band(rx))
                index = (ry - ky + window - 1) * (2 * window - 1) + rx - kx + window - 1
                yield (ky + shift) % side, (kx + shift) % side, table[index] - 100 * apart

    with torch.no_grad():
        torch.testing.assert_close(
            attention(tokens, torch.zeros_like(tokens)).stream.sum(),
            local_oracle(attention, tokens, neighbours),
        )


def test_grids_of_the_two_families():
    v1, pp = DeformableAttention, DeformableAttentionPP
    torch.testing.assert_close(v1.reference_axis(4), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(pp.reference_axis(3), torch.tensor([-0.5, 0.5, 1.5]))
    torch.testing.assert_close(pp.query_axis(3), torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("family", ["dat", "dat_pp"])
def test_a_pixel_of_a_cell_is_the_centre_of_its_receptive_field(family):
    """Measured by which pixels of the input reach a cell of the map."""
    config = SMALL_DAT if family == "dat" else VARIANTS["dat_nano"]
    model = randomised(DAT(config)).float()
    images = torch.randn(1, 3, *model.config.image_size, requires_grad=True)
    tokens = model.stem(images.permute(0, 2, 3, 1))
    for stage in range(4):
        if stage:
            tokens = model.downsamples[stage - 1](tokens)
        stride, first = model.config.cell_geometry(stage)
        cell = tokens.shape[1] // 2  # away from the borders
        (gradient,) = torch.autograd.grad(
            tokens[0, cell, cell].square().sum(), images, retain_graph=True
        )
        reached = gradient[0].abs().sum(0).nonzero()
        middle = (reached.min(0).values + reached.max(0).values + 1) / 2
        torch.testing.assert_close(middle, torch.full((2,), first + stride * cell))
