"""Softmax attention of many heads with an additive bias.

Torch's own (`scaled_dot_product_attention`) goes through the keys of a few queries at a time, so
that the matrix of logits is never stored. On a CPU its products are then many small ones, and in
bfloat16 half of the time is theirs: there two batches of products with the logits between them,
rounded to bfloat16, take 0.65 to 0.85 of its time (`bench.cpu`). The softmax is computed in float32
either way.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fused import fuses

# Keys. Torch's softmax of shorter rows of bfloat16 takes longer than one of float32 and two casts.
SHORT = 64


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Values of all keys, weighted by the softmax of their logits.

    Args:
        queries: `(B, N, heads, head_dim)`, scaled.
        keys: `(B, M, heads, head_dim)`.
        values: likewise.
        bias: `(B or a divisor of it, heads, N, M)`; that of a divisor is repeated. Where logits are
            stored, N may be several dimensions.

    Returns:
        `(B, N, heads, head_dim)`, in memory as it comes.
    """
    if stores_logits(queries):
        return _attend_by_products(queries, keys, values, bias)
    if 1 < len(bias) < len(queries):
        if queries.is_cpu:
            # A call for each image is cheaper than a copy of the bias for each.
            parts = (part.split(len(bias)) for part in (queries, keys, values))
            images = zip(*parts, strict=True)
            return torch.cat([attend(of_q, of_k, of_v, bias) for of_q, of_k, of_v in images])
        bias = bias.repeat(len(queries) // len(bias), 1, 1, 1)
    q, k, v = (part.transpose(1, 2) for part in (queries, keys, values))
    heads = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)
    return heads.transpose(1, 2)


def stores_logits(queries: Tensor) -> bool:
    """Whether `attend` stores the logits of such queries, in their type."""
    return queries.dtype == torch.bfloat16 and fuses(queries)


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    B, N, heads, width = queries.shape
    M = keys.shape[1]
    q, k, v = (
        part.transpose(1, 2).reshape(B * heads, -1, width) for part in (queries, keys, values)
    )
    logits = torch.bmm(q, k.transpose(1, 2))
    logits.view(-1, *bias.shape).add_(bias.to(logits.dtype))
    if M < SHORT:
        logits = logits.float()
    weights = logits.softmax(-1).to(q.dtype)
    return torch.bmm(weights, v).view(B, heads, N, width).transpose(1, 2)
