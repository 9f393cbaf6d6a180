"""LayerNorm over channels together with the sum before it and the GELU after it.

The reference is `torch.nn.functional.layer_norm` of `tokens + branch` or of `tokens + bias`, and
`torch.nn.functional.gelu` of that. Each token is read once; the sum, its mean and its deviation
are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Of one program: as many loads of 16 bytes of bfloat16 are under way in each thread as there are
# tensors, twice.
ELEMENTS = 2048
WARPS = 4


def add_norm(tokens: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The sum of two maps of tokens, and its norm.

    Args:
        tokens: `(..., C)`.
        branch: likewise; without it the tokens themselves are the sum.
        norm: over the channels.
    """
    total = tokens if branch is None else torch.empty_like(tokens)
    normed = torch.empty_like(tokens)
    _launch(tokens, branch, None, norm, None if branch is None else total, normed, gelu=False)
    return total, normed


def norm_activate(tokens: Tensor, bias: Tensor | None, norm: nn.LayerNorm, *, gelu: bool) -> Tensor:
    """The norm of tokens with a bias, and its GELU.

    Args:
        tokens: `(..., C)`.
        bias: `(C,)`, added before the norm.
        norm: over the channels.
        gelu: whether GELU follows, the exact one.
    """
    normed = torch.empty_like(tokens)
    _launch(tokens, None, bias, norm, None, normed, gelu=gelu)
    return normed


def _launch(
    tokens: Tensor,
    branch: Tensor | None,
    bias: Tensor | None,
    norm: nn.LayerNorm,
    total: Tensor | None,
    normed: Tensor,
    *,
    gelu: bool,
) -> None:
    maps = [tensor for tensor in (tokens, branch) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in maps), "this is a bug"
    C = tokens.shape[-1]
    N = tokens.numel() // C
    block_channels = triton.next_power_of_2(C)
    block_tokens = max(1, ELEMENTS // block_channels)
    _add_norm[(triton.cdiv(N, block_tokens),)](
        tokens,
        branch,
        bias,
        norm.weight,
        norm.bias,
        total,
        normed,
        N,
        C=C,
        eps=norm.eps,
        gelu=gelu,
        block_tokens=block_tokens,
        block_channels=block_channels,
        num_warps=WARPS,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["N"])
def _add_norm(
    tokens,
    branch,
    bias,
    norm_weight,
    norm_bias,
    total,
    normed,
    N,
    C: tl.constexpr,
    eps: tl.constexpr,
    gelu: tl.constexpr,
    block_tokens: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One program: all channels of a block of tokens."""
    channel = tl.arange(0, block_channels)
    in_tokens = channel < C
    token = tl.program_id(0).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    cells = token[:, None] * C + channel[None, :]
    mask = (token < N)[:, None] & in_tokens[None, :]
    x = tl.load(tokens + cells, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        x += tl.load(branch + cells, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + cells, x.to(total.dtype.element_ty), mask=mask)
    if bias is not None:
        x += tl.load(bias + channel, mask=in_tokens, other=0.0).to(tl.float32)[None, :]
    x = layer_norm(x, norm_weight, norm_bias, channel, C, eps)
    if gelu:
        x = exact_gelu(x)
    tl.store(normed + cells, x.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm(x, weight, bias, channel, C: tl.constexpr, eps: tl.constexpr):
    """The norm of tokens `(tokens, block)`, float32, that are zero from channel `C` on."""
    in_tokens = channel < C
    centred = x - tl.sum(x, 1)[:, None] / C
    centred = tl.where(in_tokens[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / C
    scale = tl.load(weight + channel, mask=in_tokens, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=in_tokens, other=0.0).to(tl.float32)
    return centred * tl.rsqrt(variance + eps)[:, None] * scale[None, :] + shift[None, :]


@triton.jit
def exact_gelu(x):
    """The GELU of float32, to 5e-7 of the exact one where it is rounded by less.

    A polynomial in `|x|` stands for the logarithm of the normal distribution below `-|x|`, fitted
    for the smallest error of `|x|` times it. It takes half the operations of the error function.
    """
    size = tl.abs(x)
    log = -0.0004732941238136444 * size + 0.007084462067389751
    log = log * size - 0.05182717110886594
    log = log * size - 0.4599926421784717
    log = log * size - 1.150787771699014
    log = log * size - 1.000037632076421
    return 0.5 * x + size * (0.5 - tl.exp2(log))
