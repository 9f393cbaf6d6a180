"""RoIAlign over a pyramid, against nested loops in float64."""

from math import floor, log2, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.detection.roi_align import STRIDES
from model.kernels.roi_align import align
from tests.model.detection.test_roi_align import NO_REGIONS, oracle
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples


def pyramid(sizes, channels=5, *, dtype=torch.float32, seed=0):
    """Levels of two images; whoever reads beside one of them finds no number."""
    random = generator(seed)
    levels = []
    for size in sizes:
        level = torch.randn(2, *size, channels, generator=random)
        memory = torch.full((level.numel() + 128,), torch.nan, dtype=dtype, device=DEVICE)
        memory[64:-64] = level.flatten()
        levels.append(memory[64:-64].view(level.shape))
    return levels


def level_of(x1, y1, x2, y2):
    """By the rule of Lin et al., arXiv:1612.03144, equation 1, as mmdetection rounds it."""
    size = sqrt(max(x2 - x1, 0) * max(y2 - y1, 0))
    return min(max(floor(log2(size / 56 + 1e-6)), 0), 3)


def check(levels, boxes, bins):
    pooled = align(levels, boxes.to(DEVICE), bins)
    assert pooled.shape == (*boxes.shape[:2], bins, bins, levels[0].shape[-1])
    assert pooled.dtype == levels[0].dtype
    for image, of_image in enumerate(boxes.tolist()):
        for row, box in enumerate(of_image):
            level = level_of(*box)
            cells = [side / STRIDES[level] for side in box]
            exact = oracle(levels[level][image].double().cpu(), cells, bins)
            assert_close(pooled[image, row].cpu(), exact)


@st.composite
def regions(draw):
    """Boxes `(2, R, 4)` of all levels, inside, across and outside of the maps, some empty.

    Multiples of 8 pixels are a quarter of a cell of the last level. With a shift, no sample lies
    where it begins or ceases to count, which rounding would decide.
    """
    sides = [draw(st.lists(st.integers(0, high), min_size=2, max_size=2)) for high in (100, 640)]
    place = [draw(st.integers(-160, 160)) for _ in range(4)]
    rows = [[place[0], place[1], *sides[0]], [place[2], place[3], *(s // 8 * 8 for s in sides[1])]]
    boxes = torch.tensor(rows, dtype=torch.float32) + torch.tensor([0.25, 0.25, 0, 0])
    boxes[:, 2:] += boxes[:, :2]
    return torch.stack((boxes, boxes.flip(0)))


size = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.slow
@given(
    boxes=regions(),
    sizes=st.tuples(size, size, size, size),
    bins=st.sampled_from((1, 2, 3, 7)),
    channels=st.sampled_from((1, 5, 16)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_boxes_of_any_maps(*, boxes, sizes, bins, channels, dtype, seed):
    check(pyramid(sizes, channels, dtype=dtype, seed=seed), boxes, bins)


@pytest.mark.slow
def test_channels_of_several_programs():
    """As the heads of masks have them: not all of the last block are there."""
    check(pyramid([(6, 5)] * 4, 130 + 128), torch.tensor([[[3.0, 2, 19, 21]], [[0, 0, 9, 9]]]), 14)


@pytest.mark.parametrize(
    "edge", [112, *(pytest.param(edge, marks=pytest.mark.slow) for edge in (224, 448))]
)
def test_boxes_between_two_levels(edge):
    """A square of this side is the smallest of its level; others of its area are read there too."""
    sides = [(edge, edge), (edge - 1, edge), (edge * 2, edge / 2), (edge / 2, edge * 2 - 1)]
    boxes = torch.tensor([[[0.25, 4.25, 0.25 + w, 4.25 + h] for w, h in sides]] * 2)
    levels = [level_of(*box) for box in boxes[0].tolist()]
    assert levels == [levels[0], levels[0] - 1, levels[0], levels[0] - 1]
    check(pyramid([(4, 3), (5, 5), (3, 7), (6, 2)]), boxes, 2)


def test_what_is_no_region_has_no_features():
    boxes = NO_REGIONS.repeat(2, 1, 1).to(DEVICE)
    with np.errstate(invalid="ignore"):  # the interpreter's
        assert (align(pyramid([(4, 4)] * 4), boxes, 3) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("reach", [2.0e3, 1.0e6])
def test_a_box_far_larger_than_the_map(reach):
    """A bin has the share of its samples that lie on the map, along either axis."""
    box = [-1.2 * reach, -0.7 * reach, 1.1 * reach, 0.9 * reach]
    levels = [torch.ones(1, 5, 6, 1, device=DEVICE)] * 4
    pooled = align(levels, torch.tensor([[box]], device=DEVICE), 7)[0, 0, :, :, 0]
    x1, y1, x2, y2 = (side / 32 - 0.5 for side in box)
    rows, columns = share_inside(y1, y2, 5), share_inside(x1, x2, 6)
    assert sum(rows) > 0
    assert sum(columns) > 0
    expected = torch.outer(rows, columns).float()
    torch.testing.assert_close(pooled.cpu(), expected, rtol=0.02, atol=0)


def share_inside(start, end, size, bins=7):
    samples = np.ceil((end - start) / bins)
    position = start + (np.arange(bins * samples) + 0.5) * (end - start) / (bins * samples)
    inside = (position >= -1) & (position <= size)
    return torch.from_numpy(inside.reshape(bins, -1).mean(1))


@pytest.mark.slow
def test_a_box_without_bounds_takes_no_time():
    boxes = torch.tensor([[[-side, -side, side, side], [0, 0, side, 1]] for side in (1e12, 1e30)])
    with np.errstate(over="ignore"):  # the interpreter's
        assert align(pyramid([(2, 3)] * 4), boxes.to(DEVICE), 3).isfinite().all()


def test_no_boxes():
    assert align(pyramid([(4, 4)] * 4), torch.zeros(2, 0, 4, device=DEVICE), 7).shape[:2] == (2, 0)
