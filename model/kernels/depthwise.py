"""Depthwise convolutions of 3x3 cells, with the sum before them and the GELU or LayerNorm after.

The reference is `torch.nn.functional.conv2d` with a padding of one cell and as many groups as
channels, between the operations of `model.dat.ConvMlp` and `model.dat.BlockPP`. A program goes
down a strip of columns with the outputs of three rows as sums in registers, so it loads a row of
the map once, and a thread has two columns, so it loads a cell twice instead of three times.
Instructions are what limits a GPU here, not memory. Sums are float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from model.kernels.norm import exact_gelu


class Launch(NamedTuple):
    """How programs share the work.

    Attributes:
        elements: pairs of columns times channels of a strip, at least.
        channels: that a thread has next to each other; it holds the 9 weights of each.
        rows: of a strip, if there are `MANY` such strips.
    """

    elements: int
    channels: int
    rows: int


GELU = Launch(elements=256, channels=2, rows=14)
NORM = Launch(elements=512, channels=4, rows=7)
CHANNELS = 64  # of a strip without a norm; with one, all are in one program
MANY = 528  # of four for each multiprocessor
FEWER_ROWS = 4  # of a strip else; short strips read more rows twice


def convolve_gelu(tokens: Tensor, conv: nn.Conv2d) -> Tensor:
    """The convolution of tokens `(B, H, W, C)` and its GELU, the exact one."""
    active = torch.empty_like(tokens)
    C = tokens.shape[-1]
    block_channels = CHANNELS if C % CHANNELS == 0 else 32
    _launch(tokens, None, conv, None, active, None, block_channels, GELU)
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
    _launch(tokens, branch, conv, norm, convolved, normed, block_channels, NORM)
    return convolved, normed


def _launch(
    tokens: Tensor,
    branch: Tensor | None,
    conv: nn.Conv2d,
    norm: nn.LayerNorm | None,
    convolved: Tensor,
    normed: Tensor | None,
    block_channels: int,
    launch: Launch,
) -> None:
    maps = [tensor for tensor in (tokens, branch) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in maps), "this is a bug"
    B, H, W, C = tokens.shape
    pairs = B * triton.cdiv(W, 2)
    block_pairs = max(1, launch.elements // block_channels)
    columns, blocks = triton.cdiv(pairs, block_pairs), triton.cdiv(C, block_channels)
    many = columns * blocks * triton.cdiv(H, launch.rows) >= MANY
    rows = launch.rows if many else FEWER_ROWS
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
        pairs,
        rows,
        conv.weight.stride(0),
        conv.weight.stride(3),
        C=C,
        eps=0.0 if norm is None else norm.eps,
        block_pairs=block_pairs,
        block_channels=block_channels,
        num_warps=block_pairs * block_channels // (32 * launch.channels),
        num_stages=1,
    )


@triton.jit(do_not_specialize=["H", "W", "pairs", "rows"])
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
    pairs,
    rows,
    channel_stride,
    tap_stride,
    C: tl.constexpr,
    eps: tl.constexpr,
    block_pairs: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One program: some channels of a strip of pairs of columns, which may be of several images."""
    strips = tl.cdiv(H, rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    in_tokens = channel < C
    pair = tl.program_id(0) // strips * block_pairs + tl.arange(0, block_pairs)
    pairs_of_row = tl.cdiv(W, 2)
    x = pair % pairs_of_row * 2
    first = tl.program_id(0) % strips * rows
    end = tl.minimum(first + rows, H)

    weight += channel * channel_stride
    upper_left, upper, upper_right = _taps(weight, tap_stride, in_tokens)
    left, centre, right = _taps(weight + 3 * tap_stride, tap_stride, in_tokens)
    lower_left, lower, lower_right = _taps(weight + 6 * tap_stride, tap_stride, in_tokens)
    shift = tl.load(bias + channel, mask=in_tokens, other=0.0).to(tl.float32)[None, :]

    # From the first cell of a column, in 64 bits: the maps of a batch may be large.
    cells = (pair // pairs_of_row).to(tl.int64) * H * W + x
    cells = cells[:, None] * C + channel[None, :]
    mask = (pair < pairs)[:, None] & in_tokens[None, :]
    west_mask, second_mask = mask & (x > 0)[:, None], mask & (x < W - 1)[:, None]
    masks = west_mask, mask, second_mask, mask & (x < W - 2)[:, None]

    first_above = tl.zeros((block_pairs, block_channels), tl.float32)
    second_above, first_here, second_here = first_above, first_above, first_above
    row = _row(tokens, cells, first - 1, end, H, W, C, masks)
    if branch is not None:
        more = _row(branch, cells, first - 1, end, H, W, C, masks)
    for y in range(first - 1, end + 1):
        # The next row is on its way while this one is computed.
        west, one, two, east = _widened(row)
        if branch is not None:
            branch_row = _widened(more)
            west, one = west + branch_row[0], one + branch_row[1]
            two, east = two + branch_row[2], east + branch_row[3]
        row = _row(tokens, cells, y + 1, end, H, W, C, masks)
        if branch is not None:
            more = _row(branch, cells, y + 1, end, H, W, C, masks)
        first_done = _add(first_above, west, one, two, lower_left, lower, lower_right)
        second_done = _add(second_above, one, two, east, lower_left, lower, lower_right)
        first_above = _add(first_here, west, one, two, left, centre, right)
        second_above = _add(second_here, one, two, east, left, centre, right)
        first_here = _add(shift, west, one, two, upper_left, upper, upper_right)
        second_here = _add(shift, one, two, east, upper_left, upper, upper_right)
        if y > first:
            done_cells = cells + (y - 1) * W * C
            if norm_weight is None:
                first_done, second_done = exact_gelu(first_done), exact_gelu(second_done)
            else:
                first_normed, second_normed = _layer_norm(
                    first_done, second_done, norm_weight, norm_bias, channel, C, eps
                )
                _store(normed, done_cells, first_normed, mask)
                _store(normed, done_cells + C, second_normed, second_mask)
            _store(convolved, done_cells, first_done, mask)
            _store(convolved, done_cells + C, second_done, second_mask)


@triton.jit
def _taps(weight, tap_stride, in_tokens):
    """A row of the kernels of some channels, three times `(1, channels)`, float32."""
    first = tl.load(weight, mask=in_tokens, other=0.0)
    second = tl.load(weight + tap_stride, mask=in_tokens, other=0.0)
    third = tl.load(weight + 2 * tap_stride, mask=in_tokens, other=0.0)
    return (
        first.to(tl.float32)[None, :],
        second.to(tl.float32)[None, :],
        third.to(tl.float32)[None, :],
    )


@triton.jit
def _row(tokens, cells, y, end, H, W, C: tl.constexpr, masks):
    """The cells of a row of a strip and their neighbours on both sides, zero outside."""
    in_map = (y >= 0) & (y < H) & (y <= end)
    row = tokens + cells + y * W * C
    west = tl.load(row - C, mask=masks[0] & in_map, other=0.0)
    one = tl.load(row, mask=masks[1] & in_map, other=0.0)
    two = tl.load(row + C, mask=masks[2] & in_map, other=0.0)
    east = tl.load(row + 2 * C, mask=masks[3] & in_map, other=0.0)
    return west, one, two, east


@triton.jit
def _widened(row):
    return (
        row[0].to(tl.float32),
        row[1].to(tl.float32),
        row[2].to(tl.float32),
        row[3].to(tl.float32),
    )


@triton.jit
def _add(total, west, middle, east, left, centre, right):
    """The products of three cells of a row and their taps, added to a sum."""
    return total + west * left + middle * centre + east * right


@triton.jit
def _store(target, cells, values, mask):
    tl.store(target + cells, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm(first, second, weight, bias, channel, C: tl.constexpr, eps: tl.constexpr):
    """The norms of two columns, whose sums over channels are exchanged between warps at once."""
    in_tokens = channel < C
    columns = tl.join(first, second)
    centred = columns - (tl.sum(columns, 1) / C)[:, None, :]
    centred = tl.where(in_tokens[None, :, None], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / C
    first, second = tl.split(centred * tl.rsqrt(variance + eps)[:, None, :])
    scale = tl.load(weight + channel, mask=in_tokens, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(bias + channel, mask=in_tokens, other=0.0).to(tl.float32)[None, :]
    return first * scale + shift, second * scale + shift
