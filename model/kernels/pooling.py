"""LayerNorm of every token and the mean over all of an image, in one pass.

The reference is `model.dat.DAT.pooled`. All is float32, whatever the type of the tokens, and the
normed tokens are never in memory. The mean of an affine map is the affine map of the mean, so
scale and shift are applied once.
"""

import triton
import triton.language as tl
from torch import Tensor, nn

# A program has a whole image, so for one image it had better be wide.
TOKENS = 16
WARPS = 16


def normed_mean(tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
    """`norm(tokens).mean((1, 2))`, `(B, H, W, C)` to `(B, C)`, of the type of the norm."""
    assert tokens.is_contiguous(), "this is a bug"
    B, H, W, C = tokens.shape
    pooled = tokens.new_empty(B, C, dtype=norm.weight.dtype)
    _normed_mean[B,](
        tokens,
        norm.weight,
        norm.bias,
        pooled,
        H * W,
        C=C,
        eps=norm.eps,
        block_tokens=TOKENS,
        block_channels=triton.next_power_of_2(C),
        num_warps=WARPS,
        num_stages=1,
    )
    return pooled


@triton.jit(do_not_specialize=["cells"])
def _normed_mean(
    tokens,
    weight,
    bias,
    pooled,
    cells,
    C: tl.constexpr,
    eps: tl.constexpr,
    block_tokens: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One program: an image."""
    image = tl.program_id(0).to(tl.int64)
    tokens += image * cells * C
    channel = tl.arange(0, block_channels)
    in_token = channel < C
    total = tl.zeros((block_tokens, block_channels), tl.float32)
    for start in range(0, cells, block_tokens):
        cell = start + tl.arange(0, block_tokens)
        inside = (cell < cells)[:, None] & in_token[None, :]
        token = tl.load(tokens + cell[:, None] * C + channel[None, :], mask=inside, other=0.0)
        token = token.to(tl.float32)
        centred = tl.where(inside, token - tl.sum(token, 1)[:, None] / C, 0.0)
        variance = tl.sum(centred * centred, 1) / C
        total += centred * tl.rsqrt(variance + eps)[:, None]
    scale = tl.load(weight + channel, mask=in_token, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=in_token, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / cells * scale + shift
    tl.store(pooled + image * C + channel, mean.to(pooled.dtype.element_ty), mask=in_token)
