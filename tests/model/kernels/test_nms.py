"""The search in blocks against nested loops in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kernels
from model.detection.nms import moved_apart, nms
from model.kernels.nms import BLOCK, search
from tests.model.detection.test_nms import overlap
from tests.model.kernels.conftest import DEVICE, some_examples


def oracle(boxes, threshold, limit):
    """Rows of one image, best first, compared one pair at a time in float32."""
    kept = []
    for row in range(len(boxes)):
        if len(kept) < limit and not any(
            overlap(boxes[better], boxes[row]) > np.float32(threshold) for better in kept
        ):
            kept.append(row)
    return kept


def check(images, threshold, limit):
    """A batch of images with different counts; past them are boxes that would suppress all."""
    longest = max(1, *map(len, images))
    batch = np.tile(np.float32([0, 0, 1000, 1000]), (len(images), longest, 1))
    for padded, boxes in zip(batch, images, strict=True):
        padded[: len(boxes)] = boxes
    counts = torch.tensor([len(boxes) for boxes in images], device=DEVICE)
    rows, found = search(torch.from_numpy(batch).to(DEVICE), counts, threshold, limit)
    assert rows.shape == (len(images), limit)
    for boxes, image_rows, count in zip(images, rows.tolist(), found.tolist(), strict=True):
        expected = oracle(boxes, threshold, limit)
        assert image_rows[:count] == expected
        assert not any(image_rows[count:])


def make_boxes(random, count, kind):
    if kind == "few places":  # ties at the threshold, copies, and boxes without area
        corners, sizes = random.integers(0, 5, (count, 2)), random.integers(0, 4, (count, 2))
    else:
        corners, sizes = random.uniform(0, 60, (count, 2)), random.uniform(5, 30, (count, 2))
    boxes = np.concatenate((corners, corners + sizes), 1).astype(np.float32)
    if kind == "broken":
        ruined = random.random(boxes.shape) < 0.05
        boxes[ruined] = random.choice(np.float32([np.nan, np.inf, -np.inf, -3]), ruined.sum())
    return boxes


@given(
    counts=st.lists(st.integers(0, 2 * BLOCK + 5), min_size=1, max_size=3),
    kind=st.sampled_from(["few places", "anywhere", "broken"]),
    threshold=st.sampled_from([0.3, 0.5, 0.7]),
    limit=st.integers(1, BLOCK + 10),
    seed=st.integers(0, 2**31),
)
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@settings(some_examples, max_examples=40)
def test_any_boxes(counts, kind, threshold, limit, seed):
    random = np.random.default_rng(seed)
    check([make_boxes(random, count, kind) for count in counts], threshold, limit)


def strips(starts, length=10):
    """Boxes of one pixel's height."""
    starts = np.asarray(starts, np.float32)
    return np.stack((starts, 0 * starts, starts + length, 0 * starts + 1), 1)


def test_a_chain_is_resolved_link_by_link():
    """Every box overlaps the one before and the one after: every other one is kept."""
    check([strips(2 * np.arange(BLOCK + 6))], 0.5, 2 * BLOCK)


def test_a_kept_box_removes_those_of_every_later_block():
    apart = strips(100 * np.arange(2 * BLOCK + 9))
    check([np.concatenate((apart, apart + 1, apart))], 0.5, 4 * BLOCK)


@pytest.mark.parametrize("limit", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_the_search_ends_with_the_limit(limit):
    check([strips(20 * np.arange(2 * BLOCK + 7)), strips([0, 1, 40])], 0.5, limit)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_an_iou_at_the_threshold_removes_nothing(threshold):
    """Where the nearest float32 lies above the decimal number (0.3) and where below."""
    boxes = np.concatenate((strips([0]), strips([0], 10 * np.float32(threshold))))
    (wide, narrow) = boxes
    assert overlap(wide, narrow) == np.float32(threshold)
    check([boxes], threshold, 5)
    two = torch.tensor([2], device=DEVICE)
    rows, found = search(torch.from_numpy(boxes)[None].to(DEVICE), two, threshold, 5)
    assert (found.tolist(), rows.tolist()) == ([2], [[0, 1, 0, 0, 0]])


def batch(seed):
    """Two images of candidates in three groups, one of them with many that do not count."""
    random = np.random.default_rng(seed)
    boxes = np.stack([make_boxes(random, 150, kind) for kind in ("anywhere", "few places")])
    scores = torch.from_numpy(random.integers(1, 30, (2, 150)).astype(np.float32) / 30)
    valid = torch.from_numpy(random.random((2, 150)) < [[0.9], [0.3]])
    groups = torch.from_numpy(random.integers(0, 3, (2, 150)))
    parts = torch.from_numpy(boxes), groups, scores, valid
    return [part.to(DEVICE) for part in parts]


@pytest.mark.parametrize("limit", [20, 100])
def test_suppression_is_the_same_with_and_without(monkeypatch, limit):
    def remaining(seed, usable):
        monkeypatch.setattr(kernels, "usable", lambda _: usable)
        boxes, groups, scores, valid = batch(seed)
        kept = nms(moved_apart(boxes, groups, valid), scores, valid, 0.5, limit)
        of_images = zip(kept.indices.tolist(), kept.counts.tolist(), strict=True)
        return [row[:count] for row, count in of_images]

    for seed in range(2):
        assert remaining(seed, True) == remaining(seed, False)
