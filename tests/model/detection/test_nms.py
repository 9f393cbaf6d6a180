"""Suppression against nested loops."""

import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection.nms import best_of, first_of, moved_apart, nms


def oracle(boxes, scores, groups, threshold, limit):
    """Greedy suppression, one pair of boxes at a time, in float32; a NaN is the lowest score."""
    order = sorted(range(len(boxes)), key=lambda index: (np.isnan(scores[index]), -scores[index]))
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


def search(batch, threshold, limit):
    """What remains in every image."""
    boxes, scores, groups, valid = map(torch.from_numpy, batch)
    kept = nms(moved_apart(boxes, groups, valid), scores, valid, threshold, limit)
    assert kept.indices.shape == (len(boxes), max(kept.counts.tolist()))
    return [row[:count] for row, count in zip(kept.indices.tolist(), kept.counts, strict=True)]


def search_image(boxes, scores, groups, threshold, limit):
    """What remains of the boxes of one image, all of them valid."""
    one = (boxes[None], scores[None], groups[None], np.ones((1, len(boxes)), bool))
    (kept,) = search(one, threshold, limit)
    return kept


@st.composite
def batches(draw):
    """Few places, sizes and scores, so that there are ties, copies and boxes without area."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 40)), 7
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    table = random.integers(0, 7, shape).astype(np.float32)
    boxes = np.concatenate((table[..., :2], table[..., :2] + table[..., 2:4]), -1)
    scores = np.where(table[..., 4] > 0, table[..., 4] / 6, np.float32("nan"))
    groups, valid = table[..., 5].astype(np.int64) // 3, table[..., 6] > 1
    # What is not valid has no say, whatever it is.
    boxes[~valid] = draw(st.sampled_from([np.nan, np.inf, 0, 1e9]))
    return boxes, scores.astype(np.float32), groups, valid


@settings(deadline=None)
@given(batches(), st.sampled_from([0.3, 0.5, 0.7]), st.integers(1, 50))
def test_what_remains_is_what_a_greedy_search_keeps(batch, threshold, limit):
    for image, kept in enumerate(search(batch, threshold, limit)):
        boxes, scores, groups, valid = (part[image] for part in batch)
        real = valid.nonzero()[0]
        expected = oracle(boxes[real], scores[real], groups[real], threshold, limit)
        assert kept == real[expected].tolist()


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_more_boxes_than_are_compared_at_once(seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(150, 300))
    corners = random.uniform(0, 60, (count, 2))
    boxes = np.concatenate((corners, corners + random.uniform(5, 30, (count, 2))), 1)
    boxes = boxes.astype(np.float32)
    scores, groups = random.random(count, np.float32), random.integers(0, 3, count)
    expected = oracle(boxes, scores, groups, 0.5, count)
    for limit in (10, count):
        assert search_image(boxes, scores, groups, 0.5, limit) == expected[:limit]


def test_an_iou_at_the_threshold_suppresses_nothing():
    boxes = np.array([[0, 0, 2, 1], [0, 0, 1, 1]], np.float32)
    scores, groups = np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64)
    assert search_image(boxes, scores, groups, 0.5, 9) == [0, 1]
    assert search_image(boxes, scores, groups, 0.49, 9) == [0]


def test_boxes_without_area_survive():
    boxes = np.zeros((3, 4), np.float32)
    scores, groups = np.array([0.5, 0.9, 0.5], np.float32), np.zeros(3, np.int64)
    assert search_image(boxes, scores, groups, 0.5, 9) == [1, 0, 2]


def test_tens_of_thousands_of_boxes_take_a_moment():
    """As many as a hostile image can bring about: 1000 regions with 19 classes each."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, 1000, (19_000, 2)).astype(np.float32)
    boxes = np.concatenate((corners, corners + 100), 1)
    scores, groups = random.random(19_000, np.float32), random.integers(0, 80, 19_000)
    start = time.perf_counter()
    assert len(search_image(boxes, scores, groups, 0.5, 100)) == 100
    assert time.perf_counter() - start < 2


@settings(deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_rows_are_those_of_each_image(chosen, seed):
    chosen = torch.tensor(chosen)
    values = torch.randint(3, chosen.shape, generator=torch.Generator().manual_seed(seed)).float()
    for rows, ranked in ((first_of(chosen, 7), False), (best_of(values, chosen, 4), True)):
        taken = rows.of(values)
        for image, of_image in enumerate(values.tolist()):
            expected = chosen[image].nonzero().flatten().tolist()
            if ranked:
                expected = sorted(expected, key=[-value for value in of_image].__getitem__)[:4]
            count = rows.counts[image]
            assert rows.indices[image, :count].tolist() == expected
            assert taken[image, :count].tolist() == [of_image[index] for index in expected]
            assert not taken[image, count:].any()
