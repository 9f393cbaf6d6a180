"""Deformable attention in one pass over the keys, with the position bias read in registers.

The reference is `model.attention.DeformableAttention.forward` after its projections:
`scaled_dot_product_attention` with `relative_position_bias`. Here neither the bias nor the
attention matrix, both `(B, heads, HW, Ns)`, is ever in memory: the softmax is that of
FlashAttention (arXiv:2205.14135), and each logit takes its bias from the table as it is made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    inputs = (queries, keys_values, table, query_rows, query_columns, locations)
    assert all(tensor.is_contiguous() for tensor in inputs), "this is a bug"
    B, N, C = queries.shape
    heads, TH, TW = table.shape
    attended = torch.empty_like(queries)
    _deformable_attention[triton.cdiv(N, QUERIES), heads, B](
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
        key_cells = key[:, None] * (2 * C) + channel[None, :]
        key_mask = in_keys[:, None] & in_head[None, :]
        k = tl.load(keys_values + key_cells, mask=key_mask, other=0.0)
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

        logits = tl.dot(q, tl.trans(k), acc=bias, input_precision="ieee") * LOG2_E
        logits = tl.where(in_keys[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        kept = tl.exp2(largest - larger)
        weights = tl.exp2(logits - larger[:, None])
        v = tl.load(keys_values + C + key_cells, mask=key_mask, other=0.0)
        total = total * kept + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * kept[:, None], input_precision="ieee")
        largest = larger

    result = (mixed / total[:, None]).to(attended.dtype.element_ty)
    tl.store(attended + query_cells, result, mask=query_mask)
