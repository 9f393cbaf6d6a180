"""What a detector should have answered."""

import numpy as np
import pytest
import torch

from demo.detection.scenes import scene
from demo.detection.targets import (
    BACKGROUND,
    IGNORED,
    assign,
    encode,
    mask_targets,
    overlaps,
    sample,
)
from model.detection.boxes import decode


def boxes(count, seed):
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)) * 200
    return torch.cat((corners.amin(1), corners.amax(1) + 5), -1)


def test_overlaps_of_known_boxes():
    first = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    second = torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 20]])
    torch.testing.assert_close(overlaps(first, second), torch.tensor([[1 / 3, 0.5], [0, 0]]))


@pytest.mark.parametrize("stds", [(), (0.1, 0.1, 0.2, 0.2)])
def test_decoding_gives_the_encoded_boxes(stds):
    start, end = boxes(50, 0), boxes(50, 1)
    limits = torch.tensor([1000.0, 1000.0])
    decoded = decode(start, encode(start, end, stds), limits, stds)
    torch.testing.assert_close(decoded, end, rtol=1e-4, atol=1e-3)


def test_boxes_belong_to_what_they_overlap():
    overlap = torch.tensor([[0.8, 0.1], [0.5, 0.2], [0.1, 0.2], [0.1, 0.4], [0.7, 0.75]])
    assigned = assign(overlap, 0.3, 0.7, best_of_each=False)
    assert assigned.tolist() == [0, IGNORED, BACKGROUND, IGNORED, 1]
    last_gone = overlap[:4]
    assert assign(last_gone, 0.3, 0.7, best_of_each=True).tolist() == [0, IGNORED, BACKGROUND, 1]
    # Not below the lower limit.
    assert assign(last_gone[:3], 0.3, 0.7, best_of_each=True).tolist() == [0, IGNORED, BACKGROUND]


def test_a_sample_is_balanced_and_full():
    assigned = torch.full((100,), BACKGROUND)
    assigned[:30] = 2
    assigned[30:40] = IGNORED
    generator = torch.Generator().manual_seed(0)
    positive, negative = sample(assigned, 40, 0.5, generator)
    assert (len(positive), len(negative)) == (20, 20)
    assert (assigned[positive] == 2).all()
    assert (assigned[negative] == BACKGROUND).all()
    assert len({*positive.tolist(), *negative.tolist()}) == 40
    positive, negative = sample(assigned, 80, 0.5, generator)
    assert (len(positive), len(negative)) == (30, 50)


def test_masks_of_regions_are_cut_from_the_picture():
    """At the size of the region in pixels a mask is the picture's own."""
    rendered = scene(5, 7, 120, 150)
    instances = torch.from_numpy(rendered.instances)
    for index, mask in enumerate(rendered.masks):
        x1, y1, x2, y2 = rendered.boxes[index].astype(int)
        side = min(x2 - x1, y2 - y1)
        region = torch.tensor([[x1, y1, x1 + side, y1 + side]], dtype=torch.float32)

        def target(boxes, cells, index=index):
            return mask_targets(instances, torch.tensor([index]), boxes, cells)[0]

        np.testing.assert_array_equal(target(region, side), mask[y1 : y1 + side, x1 : x1 + side])
        # The centres of the cells count: these have not left their pixels.
        np.testing.assert_array_equal(target(region - 0.4, side), target(region, side))
        coarse = target(region, 28).mean().item()
        assert coarse == pytest.approx(target(region, side).mean().item(), abs=0.05)
