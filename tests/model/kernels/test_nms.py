"""The search in blocks against nested loops in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    longest = max(map(len, images), default=0) or 1
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
@some_examples
def test_any_boxes(counts, kind, threshold, limit, seed):
    random = np.random.default_rng(seed)
    check([make_boxes(random, count, kind) for count in counts], threshold, limit)
