"""Greedy non-maximum suppression of a batch, one program an image.

The reference is `model.detection.nms._search`: candidates come best first, a block of them at a
time. Those that a kept box suppresses are removed first, then those that a kept one of the same
block does. There is no matrix of all pairs, whose size would bound the number of candidates.

IoUs round as they do in NumPy, or a box at the threshold would fall on the other side: divisions
are those of IEEE 754, and nothing is contracted to fused multiply-adds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
WARPS = 8


def search(boxes: Tensor, counts: Tensor, threshold: float, limit: int) -> tuple[Tensor, Tensor]:
    """Which boxes of every image remain.

    Args:
        boxes: `(B, N, 4)`, corners, float32, best first.
        counts: `(B,)`, int64, how many there are of each `N`.
        threshold: the largest IoU that two boxes may have.
        limit: the search in an image ends with so many.

    Returns:
        Rows `(B, limit)`, int64, ascending, zeros past the count; counts `(B,)`.
    """
    assert boxes.is_contiguous(), "this is a bug"
    assert boxes.dtype == torch.float32, "this is a bug"
    B, N, _ = boxes.shape
    rows = counts.new_zeros(B, limit)
    found = torch.empty_like(counts)
    _greedy_search[(B,)](
        boxes,
        counts,
        rows,
        found,
        threshold,
        N,
        limit,
        block=BLOCK,
        num_warps=WARPS,
        num_stages=1,
        enable_fp_fusion=False,
    )
    return rows, found


@triton.jit(do_not_specialize=["threshold", "N", "limit"])
def _greedy_search(boxes, counts, rows, found, threshold, N, limit, block: tl.constexpr):
    """One program: an image."""
    image = tl.program_id(0).to(tl.int64)
    boxes += image * N * 4
    rows += image * limit
    count = tl.load(counts + image).to(tl.int32)
    place = tl.arange(0, block)
    kept = 0
    start = 0
    while (start < count) & (kept < limit):
        candidate = start + place
        alive = candidate < count
        for first in range(0, kept, block):
            better = first + place[:, None]
            there = better < kept
            row = tl.load(rows + better, mask=there, other=0)
            over = _overlap(boxes, row, candidate[None, :], there, alive[None, :], threshold)
            alive = alive & (tl.max(over.to(tl.int32), 0) == 0)
        over = _overlap(
            boxes, candidate[:, None], candidate[None, :], alive[:, None], alive[None, :], threshold
        ) & (place[:, None] < place[None, :])
        # Each round settles at least the best that was not: what is kept depends on better ones.
        keeps = alive
        changes = 1
        while changes > 0:
            removed = tl.max((over & keeps[:, None]).to(tl.int32), 0)
            again = alive & (removed == 0)
            changes = tl.sum((again != keeps).to(tl.int32), 0)
            keeps = again
        target = kept + tl.cumsum(keeps.to(tl.int32), 0) - 1
        tl.store(rows + target, candidate.to(tl.int64), mask=keeps & (target < limit))
        # The next block is compared with these rows, in other threads.
        tl.debug_barrier()
        kept += tl.sum(keeps.to(tl.int32), 0)
        start += block
    tl.store(found + image, tl.minimum(kept, limit).to(tl.int64))


@triton.jit
def _overlap(boxes, one, other, one_there, other_there, threshold):
    """Whether the IoUs of boxes in the rows `one` with those in `other` are above the threshold."""
    one = boxes + 4 * one
    other = boxes + 4 * other
    left = tl.load(one, mask=one_there, other=0.0)
    top = tl.load(one + 1, mask=one_there, other=0.0)
    right = tl.load(one + 2, mask=one_there, other=0.0)
    bottom = tl.load(one + 3, mask=one_there, other=0.0)
    other_left = tl.load(other, mask=other_there, other=0.0)
    other_top = tl.load(other + 1, mask=other_there, other=0.0)
    other_right = tl.load(other + 2, mask=other_there, other=0.0)
    other_bottom = tl.load(other + 3, mask=other_there, other=0.0)
    width = tl.maximum(tl.minimum(right, other_right) - tl.maximum(left, other_left), 0.0)
    height = tl.maximum(tl.minimum(bottom, other_bottom) - tl.maximum(top, other_top), 0.0)
    inter = width * height
    area = (right - left) * (bottom - top)
    union = area + (other_right - other_left) * (other_bottom - other_top) - inter
    # Most do not touch, and to divide zero takes long. Boxes without area have no IoU.
    touch = inter > 0
    return touch & (tl.div_rn(tl.where(touch, inter, 1.0), tl.where(touch, union, 1.0)) > threshold)
