"""Non-maximum suppression, on the CPU.

As in mmcv 1.4: greedy by descending score; a box is removed by a kept one of its group if their
IoU is above the threshold. Groups (classes, or levels of a pyramid) are kept apart by moving
their boxes apart, in float32, with the rounding that this has.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

_BLOCK = 128  # rows of the matrix of IoUs that are computed at once


def nms(boxes: Floats, scores: Floats, groups: Integers, threshold: float, limit: int) -> Integers:
    """The boxes that remain, best first; ties stay in their order.

    Args:
        boxes: `(N, 4)`, corners.
        scores: `(N,)`.
        groups: `(N,)`, from 0.
        threshold: the largest IoU that two boxes of a group may have.
        limit: the search ends with so many.

    Returns:
        Indices `(n,)`.
    """
    kept: list[int] = []
    if not len(boxes):
        return np.array(kept, np.int64)
    apart = groups.astype(np.float32) * (boxes.max() + np.float32(1))
    # Best first; what is suppressed by an earlier block is dropped before the next one.
    waiting = np.argsort(-scores, kind="stable")
    while len(waiting) and len(kept) < limit:
        moved = boxes[waiting] + apart[waiting, None]
        suppressed = _iou(moved[:_BLOCK], moved) > threshold
        alive = np.ones(len(waiting), bool)
        for row, best in enumerate(waiting[:_BLOCK]):
            if alive[row]:
                kept.append(best)
                alive &= ~suppressed[row]
        waiting = waiting[_BLOCK:][alive[_BLOCK:]]
    return np.array(kept[:limit], np.int64)


def _iou(rows: Floats, columns: Floats) -> Floats:
    """IoU `(R, C)` of boxes `(R, 4)` with boxes `(C, 4)`; NaN for two without any area."""
    left, top, right, bottom = (
        choose(rows[:, None, side], columns[:, side])
        for side, choose in enumerate((np.maximum, np.maximum, np.minimum, np.minimum))
    )
    inter = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    union = _areas(rows)[:, None] + _areas(columns) - inter
    with np.errstate(invalid="ignore"):
        return inter / union


def _areas(boxes: Floats) -> Floats:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
