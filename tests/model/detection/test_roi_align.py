"""RoIAlign against nested loops."""

from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection.roi_align import level_of, pooled_features, roi_align

INF, NAN = torch.inf, torch.nan
# Regions of pixels that are none: without width or height, or without numbers for them.
NO_REGIONS = torch.tensor(
    [
        [3.0, 3, 3, 9], [3, 3, 9, 3], [0, 0, 0, 0], [9, 3, 3, 9], [9, 9, 3, 3], [0, 0, 1e-9, 8],
        [NAN, 0, 8, 8], [0, 0, 8, NAN], [0, 0, INF, 8], [0, -INF, 8, 8], [-INF, 0, INF, 8],
        [INF, 0, INF, 8], [NAN, NAN, NAN, NAN],
    ]
)  # fmt: skip


def oracle(features, box, bins):
    """One box over one image `(H, W, C)`, one sample at a time, in float64."""
    x1, y1, x2, y2 = (float(side) - 0.5 for side in box)
    rows, columns = ceil((y2 - y1) / bins), ceil((x2 - x1) / bins)
    result = torch.zeros(bins, bins, features.shape[2], dtype=torch.float64)
    for i in range(bins):
        for j in range(bins):
            for row in range(rows):
                for column in range(columns):
                    y = y1 + (i + (row + 0.5) / rows) * (y2 - y1) / bins
                    x = x1 + (j + (column + 0.5) / columns) * (x2 - x1) / bins
                    result[i, j] += sample(features, y, x) / (rows * columns)
    return result


def sample(features, y, x):
    """Zero farther than a cell outside of the map, else bilinear with its border continued."""
    H, W, C = features.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return torch.zeros(C, dtype=torch.float64)
    y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
    value = torch.zeros(C, dtype=torch.float64)
    for row in {floor(y), min(floor(y) + 1, H - 1)}:
        for column in {floor(x), min(floor(x) + 1, W - 1)}:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * features[row, column]
    return value


@st.composite
def regions(draw):
    """Boxes inside, across and outside of a map, some without width or height."""
    place, size = st.integers(-24, 60), st.integers(0, 80)
    corners = st.tuples(place, place, size, size)
    rows = torch.tensor(draw(st.lists(corners, min_size=0, max_size=4)))
    # Quarters of a cell, off the places where rounding decides the number of samples.
    boxes = rows.view(-1, 4).double() / 4 + 0.01
    boxes[:, 2:] = boxes[:, :2] + rows.view(-1, 4)[:, 2:] / 4 * 1.003
    return boxes


@settings(max_examples=50, deadline=None)
@given(regions(), st.sampled_from([1, 2, 7]), st.integers(1, 9), st.integers(1, 9))
def test_a_bin_is_the_mean_of_its_samples(boxes, bins, height, width):
    features = torch.rand(2, height, width, 3, dtype=torch.float64)
    image = torch.arange(len(boxes)) % 2
    pooled = roi_align(features, boxes, image, bins)
    assert pooled.shape == (len(boxes), bins, bins, 3)
    for index, box in enumerate(boxes):
        expected = oracle(features[index % 2], box, bins)
        torch.testing.assert_close(pooled[index], expected)


def test_what_is_no_region_has_no_features():
    assert (pooled_features([torch.ones(1, 4, 4, 2)] * 4, NO_REGIONS[None], 7) == 0).all()


def test_the_size_of_a_region_decides_its_level():
    sides = torch.tensor([0.0, 1.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 5000.0])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), -1)
    assert level_of(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [(20.0, 30.0), (150.0, 100.0), (300.0, 300.0), (600.0, 500.0)])
def test_regions_are_read_from_their_level_and_image(size):
    levels = [torch.rand(2, 640 // stride, 640 // stride, 3) for stride in (4, 8, 16, 32)]
    width, height = size
    boxes = torch.tensor([[10.0, 20.0, 10 + width, 20 + height]] * 2)
    pooled = pooled_features(levels, boxes[:, None], 7)
    assert pooled.shape == (2, 1, 7, 7, 3)
    level = int(level_of(boxes)[0])
    for image, box in enumerate(boxes):
        expected = oracle(levels[level][image].double(), box / (4 << level), 7)
        torch.testing.assert_close(pooled[image, 0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bins", [7, 14])
def test_a_captured_launch_follows_its_boxes(bins):
    """At the size of the published detectors, against the plain path on the CPU."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 800 // s, 1344 // s, 256, generator=generator) for s in (4, 8, 16, 32)]
    corners = torch.rand(2, 2, 1000, 2, 2, generator=generator).sort(-2).values
    first, second = (corners * torch.tensor([1344.0, 800])).flatten(-2)
    on_device, boxes = [level.cuda() for level in levels], first.cuda()
    with torch.inference_mode():
        pooled_features(on_device, boxes, bins)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pooled = pooled_features(on_device, boxes, bins)
        boxes.copy_(second)
        graph.replay()
    expected = pooled_features(levels, second, bins)
    torch.testing.assert_close(pooled.cpu(), expected, rtol=0, atol=2e-3)
