"""Softmax and the order of all classes, in one pass.

The reference is a softmax in float32 and a stable sort, best first. Here nothing is sorted: the
rank of a class is how many come before it, which each program counts for a few classes, and which
says where the class is written. That takes as many comparisons as there are pairs of classes, and
for a thousand of them is less than the launches of a sort.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CLASSES = 16  # of a program
OTHERS = 128  # compared with at a time
WARPS = 4
MOST_CLASSES = 2048  # beyond, pairs are so many that sorting is faster


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
    _rank[triton.cdiv(K, CLASSES), B](
        logits,
        scores,
        classes,
        K,
        block_row=triton.next_power_of_2(K),
        block_classes=CLASSES,
        block_others=OTHERS,
        num_warps=WARPS,
    )
    return Ranking(scores, classes)


@triton.jit(do_not_specialize=["K"])
def _rank(
    logits,
    scores,
    classes,
    K,
    block_row: tl.constexpr,
    block_classes: tl.constexpr,
    block_others: tl.constexpr,
):
    """One program: some classes of one image."""
    row_start = tl.program_id(1).to(tl.int64) * K
    logits += row_start
    in_row = tl.arange(0, block_row)
    row = tl.load(logits + in_row, mask=in_row < K, other=float("-inf"))
    best = tl.max(row, 0)
    total = tl.sum(tl.exp(row - best), 0)

    own = tl.program_id(0) * block_classes + tl.arange(0, block_classes)
    own_score = _score(logits, own, K, best, total)
    position = tl.zeros((block_classes,), tl.int32)
    for start in range(0, K, block_others):
        other = start + tl.arange(0, block_others)
        # Scores are compared, not logits: two of these can have the same score.
        other_score = _score(logits, other, K, best, total)
        better = other_score[None, :] > own_score[:, None]
        worse = other_score[None, :] < own_score[:, None]
        # So put, it is an order of the classes even if no score is a number.
        before = better | (~worse & (other[None, :] < own[:, None]))
        position += tl.sum((before & (other < K)[None, :]).to(tl.int32), 1)
    tl.store(scores + row_start + position, own_score, mask=own < K)
    tl.store(classes + row_start + position, own, mask=own < K)


@triton.jit
def _score(logits, index, K, best, total):
    """The same operations for a class wherever it is compared, so that it has the same bits."""
    logit = tl.load(logits + index, mask=index < K, other=float("-inf"))
    return tl.math.div_rn(tl.exp(logit - best), total)
