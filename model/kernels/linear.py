"""A linear layer and its GELU in one pass, in half precision.

The reference is `gelu(linear(tokens))`, as `model.fused.linear` has it. The sum of products, the
bias and the GELU are float32, and only the result is rounded. It has four times the channels of
what it is made from, so a pass over it to apply the GELU would cost as much as the product.

In float32 the tensor cores would round to TF32, and without them cuBLAS is faster than this.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.norm import exact_gelu

PROCESSORS = 132  # of an H100
# Tiles whose rows go together through all columns: their inputs stay in the L2 cache.
ROWS_OF_TILES = 8


class Tile(NamedTuple):
    """What one program computes: so many tokens, so many outputs."""

    tokens: int
    outputs: int
    warps: int
    stages: int


# The largest of which there are enough for all processors: two of the first, three or more of
# the others fit into one at a time, so that some multiply while others apply the GELU.
TILES = (
    Tile(128, 128, warps=8, stages=3),
    Tile(128, 64, warps=4, stages=3),
    Tile(64, 64, warps=4, stages=4),
    Tile(64, 32, warps=4, stages=4),
)


def linear_gelu(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(tokens @ weight.T + bias)`, `(..., K)` to `(..., N)`, with the exact GELU.

    Args:
        tokens: `(..., K)`, bfloat16 or float16.
        weight: `(N, K)`, of the same type, as the bias.
        bias: `(N,)`.
    """
    assert tokens.is_contiguous(), "this is a bug"
    assert weight.is_contiguous(), "this is a bug"
    N, K = weight.shape
    active = tokens.new_empty(*tokens.shape[:-1], N)
    M = tokens.numel() // K
    tile = choose_tile(M, N)
    _linear_gelu[triton.cdiv(M, tile.tokens) * triton.cdiv(N, tile.outputs),](
        tokens,
        weight,
        bias,
        active,
        M,
        N=N,
        K=K,
        block_m=tile.tokens,
        block_n=tile.outputs,
        block_k=64 if K % 64 == 0 else 32,
        group=ROWS_OF_TILES,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return active


def choose_tile(M: int, N: int) -> Tile:
    """The tile for `M` tokens and `N` outputs."""
    for tile in TILES:
        if triton.cdiv(M, tile.tokens) * triton.cdiv(N, tile.outputs) >= PROCESSORS:
            return tile
    return TILES[-1]


@triton.jit(do_not_specialize=["M"])
def _linear_gelu(
    tokens,
    weight,
    bias,
    active,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
):
    """One program: a tile of the result."""
    columns: tl.constexpr = (N + block_n - 1) // block_n
    program = tl.program_id(0)
    first = program // (group * columns) * group
    rows = tl.minimum(tl.cdiv(M, block_m) - first, group)
    in_group = program % (group * columns)
    token = (first + in_group % rows) * block_m + tl.arange(0, block_m)
    output = in_group // rows * block_n + tl.arange(0, block_n)
    in_tokens = token < M
    in_outputs = output < N
    # Rows past the end are read from the last one and never written: no load needs a mask for it.
    tokens += tl.minimum(token, M - 1).to(tl.int64)[:, None] * K
    weight += tl.minimum(output, N - 1)[None, :] * K

    total = tl.zeros((block_m, block_n), tl.float32)
    for start in range(0, K, block_k):
        channel = start + tl.arange(0, block_k)
        if K % block_k == 0:
            x = tl.load(tokens + channel[None, :])
            w = tl.load(weight + channel[:, None])
        else:
            x = tl.load(tokens + channel[None, :], mask=channel[None, :] < K, other=0.0)
            w = tl.load(weight + channel[:, None], mask=channel[:, None] < K, other=0.0)
        total = tl.dot(x, w, total)

    total += tl.load(bias + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(
        active + token.to(tl.int64)[:, None] * N + output[None, :],
        exact_gelu(total).to(active.dtype.element_ty),
        mask=in_tokens[:, None] & in_outputs[None, :],
    )
