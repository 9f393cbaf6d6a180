"""Proposals, searched level by level, against one search over all levels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection import nms, rpn
from model.detection.dense import Candidates
from tests.model.detection.test_nms import oracle


@pytest.mark.parametrize("fixed", [False, True])
@settings(max_examples=30, deadline=None)
@given(
    of_levels=st.lists(st.integers(1, 25), min_size=1, max_size=5),
    most=st.sampled_from([5, 20, 200]),
    seed=st.integers(0, 2**31),
)
def test_levels_are_searched_as_if_together(fixed, of_levels, most, seed):
    """Few places and scores: ties between levels, boxes that were clipped to nothing."""
    random = np.random.default_rng(seed)
    shape = (2, sum(of_levels))
    corners, sides = random.integers(0, 8, (*shape, 2)), random.integers(0, 6, (*shape, 2))
    boxes = np.concatenate((corners, corners + sides), -1).astype(np.float32)
    scores = random.integers(0, 9, shape).astype(np.float32) / 9
    scores[random.random(shape) < 0.1] = np.nan
    levels = np.repeat(np.arange(len(of_levels)), of_levels)
    parts = torch.from_numpy(boxes), torch.from_numpy(scores), torch.zeros(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpn, "MOST_PROPOSALS", most)
        if fixed:
            patch.setattr(nms, "needed", lambda counts, most: most)
        found = rpn.proposals(Candidates(*parts, tuple(of_levels)))
    for image, count in enumerate(found.counts.tolist()):
        real = (sides[image] > 0).all(-1).nonzero()[0]
        kept = oracle(boxes[image, real], scores[image, real], levels[real], 0.7, most)
        np.testing.assert_array_equal(found.boxes[image, :count], boxes[image, real[kept]])
        assert not found.boxes[image, count:].any()
