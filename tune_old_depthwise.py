"""Depthwise convolutions of 3x3 cells, with the sum before them and the GELU or LayerNorm after.

The reference is `torch.nn.functional.conv2d` with a padding of one cell and as many groups as
channels, between the operations of `model.dat.ConvMlp` and `model.dat.BlockPP`. A program goes
down a strip of columns with the outputs of three rows as sums in registers, so it loads a row of
the map once; what a cell and its neighbours on both sides have in common comes from the L1 cache.
Sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from model.kernels.norm import layer_norm

# Columns times channels of a strip: 4 channels to a thread, of which it holds the 36 weights. With
# 8, or 16 bytes of bfloat16, half as many threads fit in the registers of a multiprocessor.
ELEMENTS = 512
WARPS = 4
# All channels of a token are in one program where they are normed; with twice the threads a strip
# still has columns to share.
NORM_ELEMENTS = 1024
NORM_WARPS = 8
# Rows of a strip: the maps of 224 pixels are multiples of the longer. Of short strips, which read
# more rows twice, there are enough for a device that has little to do.
LONG = 7
SHORT = 2
MANY = 1024


def convolve_gelu(tokens: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution of tokens `(B, H, W, C)` and its GELU, the exact one."""
    active = torch.empty_like(tokens)
    C = tokens.shape[-1]
    _launch(tokens, None, conv, None, active, None, 64 if C % 64 == 0 else 32)
    return active


def convolve_sum_norm(
    tokens: Tensor, branch: Tensor | None, conv: nn.Conv2d, norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """The convolution of a sum, and its norm.

    Args:
        tokens: `(B, H, W, C)`.
        branch: likewise; without it the tokens themselves are the sum.
        conv: 3x3 cells, depthwise, with a bias.
        norm: over the channels.
    """
    convolved, normed = torch.empty_like(tokens), torch.empty_like(tokens)
    block_channels = triton.next_power_of_2(tokens.shape[-1])
    _launch(tokens, branch, conv, norm, convolved, normed, block_channels)
    return convolved, normed


def _launch(
    tokens: Tensor,
    branch: Tensor | None,
    conv: nn.Conv2d,
    norm: nn.LayerNorm | None,
    convolved: Tensor,
    normed: Tensor | None,
    block_channels: int,
) -> None:
    maps = [tensor for tensor in (tokens, branch) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in maps), "this is a bug"
    B, H, W, C = tokens.shape
    elements = ELEMENTS if norm is None else NORM_ELEMENTS
    block_columns = max(1, elements // block_channels)
    columns, blocks = triton.cdiv(B * W, block_columns), triton.cdiv(C, block_channels)
    rows = LONG if columns * blocks * triton.cdiv(H, LONG) >= MANY else SHORT
    _depthwise[columns * triton.cdiv(H, rows), blocks](
        tokens,
        branch,
        conv.weight,
        conv.bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        convolved,
        normed,
        H,
        W,
        B * W,
        rows,
        conv.weight.stride(0),
        conv.weight.stride(3),
        C=C,
        eps=0.0 if norm is None else norm.eps,
        block_columns=block_columns,
        block_channels=block_channels,
        num_warps=WARPS if norm is None else NORM_WARPS,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["H", "W", "columns", "rows"])
def _depthwise(
    tokens,
    branch,
    weight,
    bias,
    norm_weight,
    norm_bias,
    convolved,
    normed,
    H,
    W,
    columns,
    rows,
    channel_stride,
    tap_stride,
    C: tl.constexpr,
    eps: tl.constexpr,
    block_columns: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One program: some channels of a strip of columns, which may be of several images."""
    strips = tl.cdiv(H, rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    in_tokens = channel < C
    column = tl.program_id(0) // strips * block_columns + tl.arange(0, block_columns)
    x = column % W
    first = tl.program_id(0) % strips * rows
    end = tl.minimum(first + rows, H)

    weight += channel * channel_stride
    upper_left = _tap(weight, 0 * tap_stride, in_tokens)
    upper = _tap(weight, 1 * tap_stride, in_tokens)
    upper_right = _tap(weight, 2 * tap_stride, in_tokens)
    left = _tap(weight, 3 * tap_stride, in_tokens)
    centre = _tap(weight, 4 * tap_stride, in_tokens)
    right = _tap(weight, 5 * tap_stride, in_tokens)
    lower_left = _tap(weight, 6 * tap_stride, in_tokens)
    lower = _tap(weight, 7 * tap_stride, in_tokens)
    lower_right = _tap(weight, 8 * tap_stride, in_tokens)
    shift = tl.load(bias + channel, mask=in_tokens, other=0.0).to(tl.float32)[None, :]

    # From the first cell of a column, in 64 bits: the maps of a batch may be large.
    cells = (column // W).to(tl.int64) * H * W + x
    cells = cells[:, None] * C + channel[None, :]
    mask = (column < columns)[:, None] & in_tokens[None, :]
    west_mask, east_mask = mask & (x > 0)[:, None], mask & (x < W - 1)[:, None]

    above = tl.zeros((block_columns, block_channels), tl.float32)
    here = tl.zeros((block_columns, block_channels), tl.float32)
    west, middle, east = _row(tokens, cells, first - 1, end, H, W, C, west_mask, mask, east_mask)
    west, middle, east = _widened(west, middle, east)
    if branch is not None:
        more = _row(branch, cells, first - 1, end, H, W, C, west_mask, mask, east_mask)
        west, middle, east = west + more[0], middle + more[1], east + more[2]
    for y in range(first - 1, end + 1):
        # The next row is on its way while this one is computed.
        ahead = _row(tokens, cells, y + 1, end, H, W, C, west_mask, mask, east_mask)
        if branch is not None:
            more = _row(branch, cells, y + 1, end, H, W, C, west_mask, mask, east_mask)
        done = above + west * lower_left + middle * lower + east * lower_right
        above = here + west * left + middle * centre + east * right
        here = shift + west * upper_left + middle * upper + east * upper_right
        if y > first:
            done_cells = cells + (y - 1) * W * C
            if norm_weight is None:
                done = exact_gelu(done)
            else:
                tokens_normed = layer_norm(done, norm_weight, norm_bias, channel, C, eps)
                tl.store(normed + done_cells, tokens_normed.to(normed.dtype.element_ty), mask=mask)
            tl.store(convolved + done_cells, done.to(convolved.dtype.element_ty), mask=mask)
        west, middle, east = _widened(ahead[0], ahead[1], ahead[2])
        if branch is not None:
            west, middle, east = west + more[0], middle + more[1], east + more[2]


@triton.jit
def _tap(weight, offset, in_tokens):
    """One tap of the kernels of some channels, `(1, channels)`, float32."""
    return tl.load(weight + offset, mask=in_tokens, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _row(tokens, cells, y, end, H, W, C: tl.constexpr, west_mask, mask, east_mask):
    """The cells of a row of a strip and their neighbours on both sides, zero outside."""
    in_map = (y >= 0) & (y < H) & (y <= end)
    row = tokens + cells + y * W * C
    west = tl.load(row - C, mask=west_mask & in_map, other=0.0)
    middle = tl.load(row, mask=mask & in_map, other=0.0)
    east = tl.load(row + C, mask=east_mask & in_map, other=0.0)
    return west, middle, east


@triton.jit
def _widened(west, middle, east):
    return west.to(tl.float32), middle.to(tl.float32), east.to(tl.float32)


@triton.jit
def exact_gelu(x):
    """The GELU of float32 by the error function."""
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
