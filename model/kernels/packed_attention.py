"""Deformable attention whose bias is one read of a table, made ready for it when weights change.

The reference is that of `model.kernels.deformable_attention`, for half precision: the table is
rounded to the type of the features, as the bias is there. What limits the kernel is how many
instructions a query and a key take for their bias, and how many cells their reads touch: an entry
of the table holds all four coefficients of its cell, and neighbouring threads read for
neighbouring queries.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.deformable_attention import add_keys, launch

# Added to a small number, it leaves the nearest integer in the lowest bits of a float32.
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


def pack(table: Tensor) -> Tensor:
    """The coefficients of bilinear interpolation in every cell of a table and one cell around.

    At `(y, x)` from the centre of a cell, both in [-1/2, 1/2], the bias is
    `mean + dx * x + dy * y + dxy * x * y`.

    Args:
        table: `(heads, TH, TW)`.

    Returns:
        `(heads, TH + 2, TW + 2)`, int64: the four, each rounded to bfloat16, the mean lowest.
    """
    padded = F.pad(table.float(), (1, 2, 1, 2))
    a, b, c, d = padded.unfold(1, 2, 1).unfold(2, 2, 1).flatten(-2).unbind(-1)
    coefficients = (
        (a + b + c + d) / 4,
        (b - a + d - c) / 2,
        (c - a + d - b) / 2,
        a - b - c + d,
    )
    return torch.stack(coefficients, -1).bfloat16().view(torch.int64).squeeze(-1)


def attend(
    queries: Tensor,
    keys_values: Tensor,
    packed: Tensor,
    query_rows: Tensor,
    query_columns: Tensor,
    locations: Tensor,
    *,
    clamped: bool = True,
    fits: bool = False,
) -> Tensor:
    """As `deformable_attention.attend`, with `pack(table)` and positions of queries in [-1, 1].

    Unless it is `clamped`, no displacement may leave the table by more than a cell. Where all
    `fits`, a step between queries is a step in the table, as at the size of DAT++'s, and keys are
    in [-1, 1]; then nothing is clamped.
    """
    geometry = (query_rows, query_columns, locations)
    return launch(
        _packed_attention,
        queries,
        keys_values,
        packed,
        *geometry,
        clamped=clamped and not fits,
        fits=fits,
    )


@triton.jit(do_not_specialize=["N", "W", "Ns", "PH", "PW"])
def _packed_attention(
    queries,
    keys_values,
    packed,
    query_rows,
    query_columns,
    locations,
    attended,
    N,
    W,
    Ns,
    PH,
    PW,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    offset_groups: tl.constexpr,
    clamped: tl.constexpr,
    fits: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program: a block of queries of one head of one image."""
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    group = head // (heads // offset_groups)
    C: tl.constexpr = heads * head_dim

    channel = tl.arange(0, block_dim)
    in_head = channel < head_dim
    query = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    in_map = query < N
    query_cells = (image * N + query)[:, None] * C + head * head_dim + channel[None, :]
    query_mask = in_map[:, None] & in_head[None, :]
    q = tl.load(queries + query_cells, mask=query_mask, other=0.0)
    # Positions count cells of the table with its border; the half makes rounding go down.
    scale_y, scale_x = (PH - 3) * 0.25, (PW - 3) * 0.25
    row = tl.minimum(query // W, N // W - 1)
    if fits:
        step = row * PW + query % W
        query_y = tl.load(query_rows) * scale_y + (PH - 2) * 0.5
        query_x = tl.load(query_columns) * scale_x + (PW - 2) * 0.5
    else:
        query_y = tl.load(query_rows + row) * scale_y + (PH - 2) * 0.5
        query_x = tl.load(query_columns + query % W) * scale_x + (PW - 2) * 0.5

    packed += head * PH * PW
    locations += (image * offset_groups + group) * Ns * 2
    keys_values += image * Ns * 2 * C + head * head_dim
    largest = tl.full((block_queries,), float("-inf"), tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    mixed = tl.zeros((block_queries, block_dim), tl.float32)
    for start in range(0, Ns, block_keys):
        key = start + tl.arange(0, block_keys)
        in_keys = key < Ns
        key_y = tl.load(locations + 2 * key, mask=in_keys, other=0.0) * scale_y
        key_x = tl.load(locations + 2 * key + 1, mask=in_keys, other=0.0) * scale_x
        # Added to the logits: nothing, or what leaves no number of them.
        edge = tl.where(in_keys, (key_y - key_y) + (key_x - key_x), float("-inf"))
        key_y = _inside(key_y, scale_y, clamped, fits)
        key_x = _inside(key_x, scale_x, clamped, fits)
        # Queries are along the last axis: there Triton lays out neighbouring threads.
        if fits:
            cell_y, y = _nearest(query_y - key_y[:, None], PH, False)
            cell_x, x = _nearest(query_x - key_x[:, None], PW, False)
            place = cell_y * PW + cell_x + step[None, :]
        else:
            cell_y, y = _nearest(query_y[None, :] - key_y[:, None], PH, clamped)
            cell_x, x = _nearest(query_x[None, :] - key_x[:, None], PW, clamped)
            place = cell_y * PW + cell_x
        bias = tl.trans(_interpolated(packed + place, y, x) + edge[:, None])
        cells = keys_values + key[:, None] * (2 * C) + channel[None, :]
        mask = in_keys[:, None] & in_head[None, :]
        largest, total, mixed = add_keys(q, bias, cells, C, mask, largest, total, mixed)

    result = (mixed / total[:, None]).to(attended.dtype.element_ty)
    tl.store(attended + query_cells, result, mask=query_mask)


@triton.jit
def _inside(position, farthest, clamped: tl.constexpr, fits: tl.constexpr):
    """The position of a key from which no read is outside the table; the middle if it has none."""
    position = tl.where(tl.abs(position) < float("inf"), position, 0.0)
    if not clamped:
        # Rounding may take it a little farther.
        farthest = farthest if fits else farthest + 0.9
        position = tl.minimum(tl.maximum(position, -farthest), farthest)
    return position


@triton.jit
def _nearest(position, size, clamped: tl.constexpr):
    """The nearest cell of an axis (int32), and how far from its centre a position is.

    A position outside, if clamped, goes to the border, where the table has zeros.
    """
    if clamped:
        position = tl.minimum(tl.maximum(position, -0.5), size - 1.5)
    rounded = position + ROUND
    return rounded.to(tl.int32, bitcast=True) - ROUND_BITS, position - (rounded - ROUND)


@triton.jit
def _interpolated(cells, y, x):
    """The bias at `(y, x)` from the centres of cells, float32."""
    four = tl.load(cells)
    low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
    mean = (low << 16).to(tl.float32, bitcast=True)
    dx = (low & -65536).to(tl.float32, bitcast=True)
    dy = (high << 16).to(tl.float32, bitcast=True)
    dxy = (high & -65536).to(tl.float32, bitcast=True)
    return tl.fma(y, tl.fma(dxy, x, dy), tl.fma(dx, x, mean))
