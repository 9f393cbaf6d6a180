"""Deformable attention whose bias is one read of a table, made ready for it when weights change.

The reference is that of `model.kernels.deformable_attention`, for half precision: the table is
rounded to the type of the features, as the bias is there. What limits the kernel is how many
instructions a query and a key take for their bias, so an entry of the table holds all four
coefficients of its cell, and heads that share their positions are computed together.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 64
KEYS = 32
WARPS = 4
# Axis of the queries in a block of the bias: that along which Triton lays out neighbouring threads.
SIDE = 0
LOG2_E = tl.constexpr(1.4426950408889634)
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
    upper, lower = padded[:, :-1], padded[:, 1:]
    a, b, c, d = upper[..., :-1], upper[..., 1:], lower[..., :-1], lower[..., 1:]
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
    together: int = 1,
    block_queries: int = QUERIES,
    block_keys: int = KEYS,
    warps: int = WARPS,
    stages: int = 1,
    side: int = SIDE,
) -> Tensor:
    """As `deformable_attention.attend`, with `pack(table)`.

    Positions of queries are inside [-1, 1].

    Args:
        clamped: whether displacements can leave the table by more than a cell.
        fits: whether a step between queries is a step in the table, as at the size of DAT++'s,
            whose keys are inside [-1, 1]; then nothing is clamped.
        together: heads of a program, 1 or 2, which must share their positions.
    """
    inputs = (queries, keys_values, packed, query_rows, query_columns, locations)
    assert all(tensor.is_contiguous() for tensor in inputs), "this is a bug"
    B, N, C = queries.shape
    heads, PH, PW = packed.shape
    attended = torch.empty_like(queries)
    _packed_attention[triton.cdiv(N, block_queries), heads // together, B](
        *inputs,
        attended,
        N,
        len(query_columns),
        keys_values.shape[1],
        PH,
        PW,
        heads=heads,
        head_dim=C // heads,
        offset_groups=locations.shape[1],
        together=together,
        clamped=clamped and not fits,
        fits=fits,
        side=side,
        block_queries=block_queries,
        block_keys=block_keys,
        block_dim=max(16, triton.next_power_of_2(C // heads)),
        num_warps=warps,
        num_stages=stages,
    )
    return attended


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
    together: tl.constexpr,
    clamped: tl.constexpr,
    fits: tl.constexpr,
    side: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program: a block of queries of one head, or of two, of one image."""
    head = tl.program_id(1) * together
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
    if together == 2:
        q_b = tl.load(queries + query_cells + head_dim, mask=query_mask, other=0.0)
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
    if together == 2:
        largest_b, total_b, mixed_b = largest, total, mixed
    for start in range(0, Ns, block_keys):
        key = start + tl.arange(0, block_keys)
        in_keys = key < Ns
        cells = keys_values + key[:, None] * (2 * C) + channel[None, :]
        mask = in_keys[:, None] & in_head[None, :]
        key_y = tl.load(locations + 2 * key, mask=in_keys, other=0.0) * scale_y
        key_x = tl.load(locations + 2 * key + 1, mask=in_keys, other=0.0) * scale_x
        # Added to the logits: nothing, or what leaves no number of them.
        edge = tl.where(in_keys, (key_y - key_y) + (key_x - key_x), float("-inf"))
        # What is no number has no cell, and must not be read at one.
        key_y = tl.where(key_y == key_y, key_y, 0.0)
        key_x = tl.where(key_x == key_x, key_x, 0.0)
        if not clamped:
            beyond = 0.0 if fits else 0.9
            key_y = tl.minimum(tl.maximum(key_y, -scale_y - beyond), scale_y + beyond)
            key_x = tl.minimum(tl.maximum(key_x, -scale_x - beyond), scale_x + beyond)
        if fits:
            cell_y, y = _nearest(query_y - key_y, PH, False)
            cell_x, x = _nearest(query_x - key_x, PW, False)
            first_place = cell_y * PW + cell_x
            place = tl.expand_dims(step, 1 - side) + tl.expand_dims(first_place, side)
            y, x = tl.expand_dims(y, side), tl.expand_dims(x, side)
        else:
            away_y = tl.expand_dims(query_y, 1 - side) - tl.expand_dims(key_y, side)
            away_x = tl.expand_dims(query_x, 1 - side) - tl.expand_dims(key_x, side)
            cell_y, y = _nearest(away_y, PH, clamped)
            cell_x, x = _nearest(away_x, PW, clamped)
            place = cell_y * PW + cell_x
        largest, total, mixed = _more_keys(
            q, cells, C, mask, edge, packed + place, y, x, largest, total, mixed, side
        )
        if together == 2:
            largest_b, total_b, mixed_b = _more_keys(
                q_b, cells + head_dim, C, mask, edge, packed + PH * PW + place, y, x,
                largest_b, total_b, mixed_b, side,
            )  # fmt: skip

    result = (mixed / total[:, None]).to(attended.dtype.element_ty)
    tl.store(attended + query_cells, result, mask=query_mask)
    if together == 2:
        result = (mixed_b / total_b[:, None]).to(attended.dtype.element_ty)
        tl.store(attended + query_cells + head_dim, result, mask=query_mask)


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
def _more_keys(
    q, cells, C: tl.constexpr, mask, edge, place, y, x, largest, total, mixed, side: tl.constexpr
):
    """Attend to a block of keys more.

    The queries are along the axis `side` of places and bias: neighbouring threads should read for
    neighbouring queries, whose cells are neighbours too.
    """
    four = tl.load(place)
    low, high = four.to(tl.int32), (four >> 32).to(tl.int32)
    mean = (low << 16).to(tl.float32, bitcast=True)
    dx = (low & -65536).to(tl.float32, bitcast=True)
    dy = (high << 16).to(tl.float32, bitcast=True)
    dxy = (high & -65536).to(tl.float32, bitcast=True)
    bias = tl.fma(y, tl.fma(dxy, x, dy), tl.fma(dx, x, mean)) + tl.expand_dims(edge, side)
    if side == 1:
        bias = tl.trans(bias)

    k = tl.load(cells, mask=mask, other=0.0)
    logits = tl.dot(q, tl.trans(k), acc=bias, input_precision="ieee")
    larger = tl.maximum(largest, tl.max(logits, 1))
    kept = tl.exp2((largest - larger) * LOG2_E)
    weights = tl.exp2(logits * LOG2_E - (larger * LOG2_E)[:, None])
    v = tl.load(cells + C, mask=mask, other=0.0)
    total = total * kept + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * kept[:, None], input_precision="ieee")
    return larger, total, mixed
