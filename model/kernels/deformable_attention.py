"""Deformable attention in one pass over the keys, with the position bias read in registers.

The reference is `model.attention.DeformableAttention.forward` after its projections:
`scaled_dot_product_attention` with `relative_position_bias`. Here neither the bias nor the
attention matrix, both `(B, heads, HW, Ns)`, is ever in memory: the softmax is that of
FlashAttention (arXiv:2205.14135), and each logit takes its bias from the table as it is made.

Layers take this kernel in float32, where the table must not be rounded. In half precision they
take `model.kernels.packed_attention`, which differs in how it reads the bias.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from model.kernels.bilinear import corners

QUERIES = 64
# Twice as many keys, or a pipelined loop, hold the corners of the table in more registers than
# there are.
KEYS = 32
WARPS = 4
LOG2_E = tl.constexpr(1.4426950408889634)


def attend(
    queries: Tensor,
    keys_values: Tensor,
    table: Tensor,
    query_rows: Tensor,
    query_columns: Tensor,
    locations: Tensor,
) -> Tensor:
    """Attend to keys at learned positions, `softmax(q k^T + bias) v` for each head.

    Logits, softmax and positions are float32 whatever the dtype of the features.

    Args:
        queries: `(B, H * W, C)`, scaled.
        keys_values: `(B, Ns, 2 * C)`, the channels of the keys before those of the values.
        table: `(heads, TH, TW)`, float32.
        query_rows: `(H,)`, positions of the rows of queries, float32.
        query_columns: `(W,)`.
        locations: `(B, G, Hk, Wk, 2)`, (y, x), float32, with `Hk * Wk = Ns`.

    Returns:
        `(B, H * W, C)`, before the output projection.
    """
    geometry = (query_rows, query_columns, locations)
    return launch(_deformable_attention, queries, keys_values, table, *geometry)


def launch(
    kernel: KernelInterface[Any],
    queries: Tensor,
    keys_values: Tensor,
    table: Tensor,
    query_rows: Tensor,
    query_columns: Tensor,
    locations: Tensor,
    **options: bool,
) -> Tensor:
    """Launch a kernel for `attend`, with its table and options that are compiled in."""
    inputs = (queries, keys_values, table, query_rows, query_columns, locations)
    assert all(tensor.is_contiguous() for tensor in inputs), "this is a bug"
    B, N, C = queries.shape
    heads, TH, TW = table.shape
    attended = torch.empty_like(queries)
    kernel[triton.cdiv(N, QUERIES), heads, B](
        *inputs,
        attended,
        N,
        len(query_columns),
        keys_values.shape[1],
        TH,
        TW,
        heads=heads,
        head_dim=C // heads,
        offset_groups=locations.shape[1],
        **options,
        block_queries=QUERIES,
        block_keys=KEYS,
        block_dim=max(16, triton.next_power_of_2(C // heads)),
        num_warps=WARPS,
        num_stages=1,
    )
    return attended


@triton.jit(do_not_specialize=["N", "W", "Ns", "TH", "TW"])
def _deformable_attention(
    queries,
    keys_values,
    table,
    query_rows,
    query_columns,
    locations,
    attended,
    N,
    W,
    Ns,
    TH,
    TW,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    offset_groups: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program: a block of queries of one head of one image."""
    head = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    group = head // (heads // offset_groups)
    C = heads * head_dim

    channel = tl.arange(0, block_dim)
    in_head = channel < head_dim
    query = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    in_map = query < N
    query_cells = (image * N + query)[:, None] * C + head * head_dim + channel[None, :]
    query_mask = in_map[:, None] & in_head[None, :]
    q = tl.load(queries + query_cells, mask=query_mask, other=0.0)
    query_y = tl.load(query_rows + query // W, mask=in_map, other=0.0)
    query_x = tl.load(query_columns + query % W, mask=in_map, other=0.0)

    table += head * TH * TW
    locations += (image * offset_groups + group) * Ns * 2
    keys_values += image * Ns * 2 * C + head * head_dim
    largest = tl.full((block_queries,), float("-inf"), tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    mixed = tl.zeros((block_queries, block_dim), tl.float32)
    for start in range(0, Ns, block_keys):
        key = start + tl.arange(0, block_keys)
        in_keys = key < Ns
        key_y = tl.load(locations + 2 * key, mask=in_keys, other=0.0)
        key_x = tl.load(locations + 2 * key + 1, mask=in_keys, other=0.0)

        displacement_y = (query_y[:, None] - key_y[None, :]) * 0.5
        displacement_x = (query_x[:, None] - key_x[None, :]) * 0.5
        top, bottom, top_weight, bottom_weight = corners(displacement_y, TH)
        left, right, left_weight, right_weight = corners(displacement_x, TW)
        upper, lower = table + top * TW, table + bottom * TW
        bias = top_weight * (
            left_weight * tl.load(upper + left) + right_weight * tl.load(upper + right)
        ) + bottom_weight * (
            left_weight * tl.load(lower + left) + right_weight * tl.load(lower + right)
        )

        bias = tl.where(in_keys[None, :], bias, float("-inf"))
        cells = keys_values + key[:, None] * (2 * C) + channel[None, :]
        mask = in_keys[:, None] & in_head[None, :]
        largest, total, mixed = add_keys(q, bias, cells, C, mask, largest, total, mixed)

    result = (mixed / total[:, None]).to(attended.dtype.element_ty)
    tl.store(attended + query_cells, result, mask=query_mask)


@triton.jit
def add_keys(q, bias, cells, C, mask, largest, total, mixed):
    """Attend to a block of keys more.

    Args:
        q: `(queries, channels)`.
        bias: `(queries, keys)`, float32; -inf where there is no key.
        cells: pointers to the keys, `(keys, channels)`.
        C: how much further on the values are.
        mask: where there are any.
        largest: logit so far of each query, as a power of two.
        total: of the weights so far.
        mixed: values so far, `(queries, channels)`.

    Returns:
        The last three with these keys.
    """
    k = tl.load(cells, mask=mask, other=0.0)
    logits = tl.dot(q, tl.trans(k), acc=bias, input_precision="ieee")
    larger = tl.maximum(largest, tl.max(logits, 1) * LOG2_E)
    kept = tl.exp2(largest - larger)
    weights = tl.exp2(logits * LOG2_E - larger[:, None])
    v = tl.load(cells + C, mask=mask, other=0.0)
    total = total * kept + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * kept[:, None], input_precision="ieee")
    return larger, total, mixed
