"""Softmax and the order of all classes, in one pass.

The reference is a softmax in float32 and a stable sort, best first. Here a program sorts a row in
its registers, each score and its class as one integer.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 16  # of a row, which takes as long in one program as in many
MOST_CLASSES = 2048  # that a program sorts


class Ranking(NamedTuple):
    """Scores `(B, K)`, float32, best first, and the class of each, int32; of equals the lower."""

    scores: Tensor
    classes: Tensor


def rank(logits: Tensor) -> Ranking:
    """Softmax probabilities, best first.

    Where a softmax is not defined, all scores of the row are NaN, and the classes ascend.

    Args:
        logits: `(B, K)`, float32, at most `MOST_CLASSES` classes.
    """
    assert logits.is_contiguous(), "this is a bug"
    B, K = logits.shape
    scores = logits.new_empty(B, K)
    classes = torch.empty_like(scores, dtype=torch.int32)
    _rank[B,](logits, scores, classes, K, block_row=triton.next_power_of_2(K), num_warps=WARPS)
    return Ranking(scores, classes)


@triton.jit(do_not_specialize=["K"])
def _rank(logits, scores, classes, K, block_row: tl.constexpr):
    """One program: one image."""
    row_start = tl.program_id(0).to(tl.int64) * K
    place = tl.arange(0, block_row)
    in_row = place < K
    row = tl.load(logits + row_start + place, mask=in_row, other=float("-inf"))
    exponentials = tl.exp(row - tl.max(row, 0))
    total = tl.sum(exponentials, 0)
    # No score is a number, or all are. Of positive numbers the bits have the same order.
    defined = total > 0
    score = tl.where(defined, tl.math.div_rn(exponentials, total), 0.0)
    bits = tl.where(in_row, score.to(tl.int32, bitcast=True), -1)
    # Counted from the last class, so that of equals the lower comes first.
    keys = (bits.to(tl.int64) << 32) + (block_row - 1 - place)
    ranked = tl.sort(keys, descending=True)
    best_first = (ranked >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(scores + row_start + place, tl.where(defined, best_first, total), mask=in_row)
    tl.store(classes + row_start + place, block_row - 1 - ranked.to(tl.int32), mask=in_row)
