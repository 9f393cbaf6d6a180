"""Suppression against nested loops."""

import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection.nms import moved_apart, nms


def oracle(boxes, scores, groups, threshold, limit):
    """Greedy suppression, one pair of boxes at a time, in float32."""
    order = sorted(range(len(boxes)), key=lambda index: -scores[index])
    apart = boxes.max(initial=0) + np.float32(1)
    moved = boxes + groups[:, None].astype(np.float32) * apart
    kept = []
    for index in order:
        if all(not overlap(moved[other], moved[index]) > threshold for other in kept):
            kept.append(index)
    return kept[:limit]


def overlap(one, other):
    width = np.maximum(np.minimum(one[2], other[2]) - np.maximum(one[0], other[0]), np.float32(0))
    height = np.maximum(np.minimum(one[3], other[3]) - np.maximum(one[1], other[1]), np.float32(0))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    with np.errstate(invalid="ignore"):
        return width * height / (areas[0] + areas[1] - width * height)


def search(boxes, scores, groups, threshold, limit):
    """`nms` over the boxes of one image."""
    boxes, scores, groups = (torch.from_numpy(part)[None] for part in (boxes, scores, groups))
    every = torch.ones_like(scores, dtype=torch.bool)
    kept = nms(moved_apart(boxes, groups, every), scores, every, threshold, limit)
    assert kept.counts.tolist() == [kept.indices.shape[1]]
    return kept.indices[0].tolist()


@st.composite
def candidates(draw):
    """Few places, sizes and scores, so that there are ties, copies and boxes without area."""
    count = draw(st.integers(1, 40))
    numbers = st.integers(0, 6)
    rows = draw(st.lists(st.tuples(*[numbers] * 6), min_size=count, max_size=count))
    table = np.array(rows, np.float32).reshape(count, 6)
    boxes = np.concatenate((table[:, :2], table[:, :2] + table[:, 2:4]), 1)
    return boxes, table[:, 4] / 6, table[:, 5].astype(np.int64) // 3


@settings(deadline=None)
@given(candidates(), st.sampled_from([0.3, 0.5, 0.7]), st.integers(1, 50))
def test_what_remains_is_what_a_greedy_search_keeps(case, threshold, limit):
    boxes, scores, groups = case
    kept = search(boxes, scores, groups, threshold, limit)
    assert kept == oracle(boxes, scores, groups, threshold, limit)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_more_boxes_than_are_compared_at_once(seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(250, 400))
    corners = random.uniform(0, 60, (count, 2))
    boxes = np.concatenate((corners, corners + random.uniform(5, 30, (count, 2))), 1)
    boxes = boxes.astype(np.float32)
    scores, groups = random.random(count, np.float32), random.integers(0, 3, count)
    for limit in (10, count):
        kept = search(boxes, scores, groups, 0.5, limit)
        assert kept == oracle(boxes, scores, groups, 0.5, limit)


def test_an_iou_at_the_threshold_suppresses_nothing():
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1]], np.float32)
    scores, groups = np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64)
    assert search(boxes, scores, groups, 0.5, 9) == [0, 1]
    assert search(boxes, scores, groups, 0.49, 9) == [0]


def test_boxes_without_area_survive():
    boxes = np.zeros((3, 4), np.float32)
    scores, groups = np.array([0.5, 0.9, 0.5], np.float32), np.zeros(3, np.int64)
    assert search(boxes, scores, groups, 0.5, 9) == [1, 0, 2]


def test_tens_of_thousands_of_boxes_take_a_moment():
    """As many as a hostile image can bring about: 1000 regions with 19 classes each."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 1000, (19_000, 2)).astype(np.float32)
    boxes = np.concatenate((corners, corners + 100), 1)
    scores, groups = random.random(19_000, np.float32), random.integers(0, 80, 19_000)
    start = time.perf_counter()
    assert len(search(boxes, scores, groups, 0.5, 100)) == 100
    assert time.perf_counter() - start < 2
