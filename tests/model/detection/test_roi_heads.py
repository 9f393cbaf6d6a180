"""The heads of two stages in fixed shapes."""

import pytest
import torch

from model.detection.config import MOST_DETECTIONS
from model.detection.dense import Candidates
from model.detection.detections import Found
from model.detection.roi_heads import TwoStageHead
from model.detection.rpn import proposals
from tests.fake_cuda import OnDevice, fake_cuda, move
from tests.model.detection.conftest import small_config, small_detector

STRIDES = (4, 8, 16, 32, 64)
two_stages = pytest.mark.parametrize("kind", ["mask_rcnn", "cascade_mask_rcnn"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pyramid(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(96 // stride, 128 // stride) for stride in STRIDES]
    return [torch.randn(images, *size, 16, generator=generator) for size in sizes]


def of_image(batch, image):
    """The part of tensors that one image has."""
    return [part[image : image + 1] for part in batch]


@two_stages
def test_an_image_with_few_proposals_is_answered_as_if_alone(kind):
    """Beside one with many, whose rows it has to have."""
    head = small_detector(kind).head
    levels = pyramid(2)
    limits, scales = torch.tensor([[128.0, 96], [30, 18]]), torch.tensor([[1.0, 1], [0.5, 0.4]])
    candidates = head(levels, limits)
    few, many = sorted(proposals(candidates).counts.tolist())
    assert 0 < few < many // 2
    together = head.find(levels, candidates, limits, scales).of_images()
    for image, found in enumerate(together):
        own_levels, (limit, scale) = of_image(levels, image), of_image((limits, scales), image)
        (alone,) = head.find(own_levels, head(own_levels, limit), limit, scale).of_images()
        assert len(alone.labels) > 3
        assert torch.equal(found.labels, alone.labels)
        for name in ("boxes", "scores", "mask_probabilities"):
            ours, theirs = getattr(found, name), getattr(alone, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@two_stages
def test_rows_past_the_count_have_no_masks(kind):
    head = small_detector(kind).head
    levels, scales = pyramid(2), torch.tensor([[1.0, 1], [0.5, 0.4]])
    boxes = torch.tensor([8.0, 4, 40, 50]).repeat(2, 5, 1)
    labels = torch.arange(5).expand(2, -1)
    counts = torch.tensor([5, 2])
    found = Found(boxes, boxes[..., 0], labels, counts)
    masks = head.with_masks(levels, found, scales).mask_probabilities
    assert masks.shape == (2, 5, 28, 28)
    assert (masks[1, 2:] == 0).all()
    for image, count in enumerate(counts.tolist()):
        own_levels, own_scales = of_image(levels, image), scales[image : image + 1]
        real = [part[image : image + 1, :count] for part in (boxes, boxes[..., 0], labels)]
        alone = head.with_masks(own_levels, Found(*real, counts[image : image + 1]), own_scales)
        torch.testing.assert_close(masks[image, :count], alone.mask_probabilities[0])


@two_stages
def test_nothing_waits_for_the_device(kind):
    head = TwoStageHead(small_config(kind)).to(torch.bfloat16)
    with fake_cuda() as launched, OnDevice():
        move(head)
        levels = [
            torch.empty(2, 96 // stride, 128 // stride, 16, dtype=torch.bfloat16, device="cuda")
            for stride in STRIDES
        ]
        of_levels = tuple(min(3 * level[0, ..., 0].numel(), 1000) for level in levels)
        boxes = torch.empty(2, sum(of_levels), 4, device="cuda")
        candidates = Candidates(boxes, boxes[..., 0], boxes[..., 0].long(), of_levels)
        limits, scales = torch.empty(2, 2, 2, device="cuda")
        found = head.find(levels, candidates, limits, scales)
    assert launched.count("_roi_align") == len(head.box_heads) + 1
    assert found.boxes.shape == (2, MOST_DETECTIONS, 4)
    assert found.mask_probabilities.shape == (2, MOST_DETECTIONS, 28, 28)
    assert found.mask_probabilities.dtype == torch.float32
