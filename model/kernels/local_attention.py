"""Local attention by tiles of an index, straight from the tokens of the map and back to it.

The reference is `model.local_attention`: windows and neighbourhoods cut the map into tiles by
index buffers and attend inside each with one additive bias. Here a program reads the queries,
keys and values of a tile where they lie, so nothing is gathered, rolled or put back in memory.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How programs share the work: at most so many queries and keys at a time, and stages."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 1


LAUNCH = Launch()
# Products of float32 are sums in registers, of which larger tiles need too many.
FLOAT32 = Launch(keys=32)
LOG2_E = tl.constexpr(1.4426950408889634)


def attend_in_tiles(
    qkv: Tensor,
    bias: Tensor,
    bias_index: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    place: Tensor,
) -> Tensor:
    """Attend inside tiles, `softmax(q k^T + bias) v` for each head.

    Args:
        qkv: `(B, H * W, 3 * C)`, queries scaled, then keys, then values.
        bias: `(kinds, heads, queries, keys or more)`, float32; -inf where a key is not seen, and
            from `keys` on.
        bias_index: `(tiles,)`, the kind of each tile.
        query_index: `(tiles, queries)`, cells of the map.
        key_index: `(tiles, keys)`.
        place: `(H * W,)`, which of the `tiles * queries` answers for a cell.

    Returns:
        `(B, H * W, C)`, in the order of the map, before the output projection.
    """
    inputs = (qkv, bias, bias_index, query_index, key_index, place)
    assert all(tensor.is_contiguous() for tensor in inputs), "this is a bug"
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    _, heads, queries, bias_row = bias.shape
    keys = key_index.shape[1]
    launch = FLOAT32 if qkv.element_size() == 4 else LAUNCH
    block_queries = min(launch.queries, max(16, triton.next_power_of_2(queries)))
    block_keys = min(launch.keys, max(16, triton.next_power_of_2(keys)))
    blocks = triton.cdiv(queries, block_queries)
    attended = qkv.new_empty(B, N, C)
    # Images first, then tiles: programs that run at the same time share a bias and the keys
    # that tiles have in common.
    _local_attention[B, len(query_index) * blocks, heads](
        *inputs,
        attended,
        N,
        heads=heads,
        head_dim=C // heads,
        queries=queries,
        keys=keys,
        bias_row=bias_row,
        block_queries=block_queries,
        block_keys=block_keys,
        block_dim=max(16, triton.next_power_of_2(C // heads)),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return attended


@triton.jit(do_not_specialize=["N"])
def _local_attention(
    qkv,
    bias,
    bias_index,
    query_index,
    key_index,
    place,
    attended,
    N,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
    bias_row: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program: a block of queries of one tile and head of one image."""
    image = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2)
    blocks: tl.constexpr = (queries + block_queries - 1) // block_queries
    tile = tl.program_id(1) // blocks
    C: tl.constexpr = heads * head_dim

    channel = tl.arange(0, block_dim)
    in_head = channel < head_dim
    query = tl.program_id(1) % blocks * block_queries + tl.arange(0, block_queries)
    in_tile = query < queries
    query_cell = tl.load(query_index + tile * queries + query, mask=in_tile, other=0)
    qkv += image * N * 3 * C + head * head_dim
    q = tl.load(
        qkv + query_cell[:, None] * (3 * C) + channel[None, :],
        mask=in_tile[:, None] & in_head[None, :],
        other=0.0,
    )
    bias += (tl.load(bias_index + tile) * heads + head) * queries * bias_row
    bias += tl.where(in_tile, query, 0)[:, None] * bias_row
    padded: tl.constexpr = bias_row >= (keys + block_keys - 1) // block_keys * block_keys
    largest = tl.full((block_queries,), float("-inf"), tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    mixed = tl.zeros((block_queries, block_dim), tl.float32)
    for start in range(0, keys, block_keys):
        key = start + tl.arange(0, block_keys)
        in_keys = key < keys
        key_cell = tl.load(key_index + tile * keys + key, mask=in_keys, other=0)
        key_cells = qkv + C + key_cell[:, None] * (3 * C) + channel[None, :]
        key_mask = in_keys[:, None] & in_head[None, :]
        k = tl.load(key_cells, mask=key_mask, other=0.0)
        v = tl.load(key_cells + C, mask=key_mask, other=0.0)
        if padded:
            logits = tl.load(bias + key[None, :])
        else:
            logits = tl.load(bias + key[None, :], mask=in_keys[None, :], other=float("-inf"))
        logits = tl.dot(q, tl.trans(k), acc=logits, input_precision="ieee")
        larger = tl.maximum(largest, tl.max(logits, 1))
        # A query may see none of the keys so far.
        shift = tl.where(larger == float("-inf"), 0.0, larger) * LOG2_E
        kept = tl.exp2(largest * LOG2_E - shift)
        weights = tl.exp2(logits * LOG2_E - shift[:, None])
        total = total * kept + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * kept[:, None], input_precision="ieee")
        largest = larger

    # Tiles may overlap: one of them answers for a cell.
    slot = tl.load(place + query_cell, mask=in_tile, other=-1)
    answers = in_tile & (slot == tile * queries + query)
    result = (mixed / total[:, None]).to(attended.dtype.element_ty)
    tl.store(
        attended + (image * N + query_cell)[:, None] * C + head * head_dim + channel[None, :],
        result,
        mask=answers[:, None] & in_head[None, :],
    )
