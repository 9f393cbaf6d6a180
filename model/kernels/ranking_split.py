"""As `model.kernels.ranking`, with one comparison for a pair of classes.

Scores are positive, so that the order of their bits is theirs. Before a program's own classes an
equal score comes first, after them it does not, and only among them the class decides.
"""

import torch
import triton
import triton.language as tl

from model.kernels.ranking import Ranking, _score
from torch import Tensor


def rank(logits: Tensor, *, classes: int = 32, warps: int = 4) -> Ranking:
    B, K = logits.shape
    scores = logits.new_empty(B, K)
    order = torch.empty_like(scores, dtype=torch.int32)
    _rank_split[triton.cdiv(K, classes), B](
        logits, scores, order, K,
        block_row=triton.next_power_of_2(K), block=classes, num_warps=warps,
    )  # fmt: skip
    return Ranking(scores, order)


def rank_by_sort(logits: Tensor, *, warps: int = 8) -> Ranking:
    B, K = logits.shape
    scores = logits.new_empty(B, K)
    order = torch.empty_like(scores, dtype=torch.int32)
    _rank_sorted[B,](logits, scores, order, K, block_row=triton.next_power_of_2(K), num_warps=warps)
    return Ranking(scores, order)


@triton.jit
def _bits(score, in_row):
    """Scores as integers in the same order; none is a number, or all are."""
    bits = tl.where(score == score, score, 0.0).to(tl.int32, bitcast=True)
    return tl.where(in_row, bits, -1)


@triton.jit(do_not_specialize=["K"])
def _rank_split(logits, scores, order, K, block_row: tl.constexpr, block: tl.constexpr):
    """One program: some classes of one image."""
    row_start = tl.program_id(1).to(tl.int64) * K
    logits += row_start
    in_row = tl.arange(0, block_row)
    row = tl.load(logits + in_row, mask=in_row < K, other=float("-inf"))
    best = tl.max(row, 0)
    total = tl.sum(tl.exp(row - best), 0)

    first = tl.program_id(0) * block
    own = first + tl.arange(0, block)
    own_score = _score(logits, own, K, best, total)
    own_bits = _bits(own_score, own < K)
    before = tl.zeros((block, block), tl.int32)
    for start in range(0, first, block):
        other = start + tl.arange(0, block)
        bits = _bits(_score(logits, other, K, best, total), other < K)
        before += (bits[None, :] >= own_bits[:, None]).to(tl.int32)
    tied = (own_bits[None, :] == own_bits[:, None]) & (own[None, :] < own[:, None])
    before += ((own_bits[None, :] > own_bits[:, None]) | tied).to(tl.int32)
    for start in range(first + block, K, block):
        other = start + tl.arange(0, block)
        bits = _bits(_score(logits, other, K, best, total), other < K)
        before += (bits[None, :] > own_bits[:, None]).to(tl.int32)
    position = tl.sum(before, 1)
    tl.store(scores + row_start + position, own_score, mask=own < K)
    tl.store(order + row_start + position, own, mask=own < K)


@triton.jit(do_not_specialize=["K"])
def _rank_sorted(logits, scores, order, K, block_row: tl.constexpr):
    """One program: one image."""
    row_start = tl.program_id(0).to(tl.int64) * K
    place = tl.arange(0, block_row)
    row = tl.load(logits + row_start + place, mask=place < K, other=float("-inf"))
    best = tl.max(row, 0)
    exponentials = tl.exp(row - best)
    total = tl.sum(exponentials, 0)
    score = tl.math.div_rn(exponentials, total)
    bits = _bits(score, place < K).to(tl.int64)
    # The complement of a class, so that of equals the lower comes first.
    sorted_keys = tl.sort((bits << 32) | (2147483647 - place).to(tl.int64), descending=True)
    ranked_class = 2147483647 - (sorted_keys & 4294967295).to(tl.int32)
    ranked = (sorted_keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    ranked = tl.where(total == total, ranked, total)
    tl.store(scores + row_start + place, ranked, mask=place < K)
    tl.store(order + row_start + place, ranked_class, mask=place < K)
