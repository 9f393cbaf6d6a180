"""The offset network and the sampling at its positions, in one pass over the keys.

The reference is the first half of `model.attention.DeformableAttention.forward`: `_offsets`, the
`move` of either family and `sample_features`. Nothing between the queries and the sampled
features is in memory but the sampling locations, which are an output; offsets and positions are
float32 throughout, where torch rounds each step to the dtype of the features.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, nn

from model.kernels.bilinear import corners

KEYS = 16
WARPS = 4


class Sampled(NamedTuple):
    """Features `(B, Hk * Wk, C)` and the locations `(B, G, Hk, Wk, 2)`, (y, x), float32."""

    features: Tensor
    locations: Tensor


def sample_keys(
    tokens: Tensor,
    queries: Tensor,
    conv: nn.Conv2d,
    norm: nn.LayerNorm,
    proj: nn.Linear,
    reference_points: Tensor,
    reach: Tensor | None,
) -> Sampled:
    """Sample features at the positions that the offset network reads off the queries.

    Args:
        tokens: `(B, H, W, C)`, what is sampled.
        queries: `(B, H, W, C)`.
        conv: the depthwise convolution of one group, `C / G` channels, with a bias.
        norm: over the channels of a group.
        proj: the channels of a group to an offset (y, x), without a bias.
        reference_points: `(Hk, Wk, 2)`, (y, x), float32.
        reach: `(2,)`, float32, of DAT: offsets go through tanh and move a point at most so far.
            `None` is the rule of DAT++: offsets are unbounded, locations clamped to [-1, 1].
    """
    inputs = (tokens, queries, reference_points)
    assert all(tensor.is_contiguous() for tensor in inputs), "this is a bug"
    B, H, W, C = tokens.shape
    Hk, Wk, _ = reference_points.shape
    channels = conv.out_channels
    features = tokens.new_empty(B, Hk * Wk, C)
    locations = reference_points.new_empty(B, C // channels, Hk, Wk, 2)
    _sample_keys[triton.cdiv(Hk * Wk, KEYS), C // channels, B](
        tokens,
        queries,
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        proj.weight,
        reference_points,
        reach,
        features,
        locations,
        H,
        W,
        Hk * Wk,
        Wk,
        C=C,
        channels=channels,
        kernel=conv.kernel_size[0],
        stride=conv.stride[0],
        eps=norm.eps,
        block_keys=KEYS,
        block_channels=triton.next_power_of_2(channels),
        num_warps=WARPS,
        num_stages=1,
    )
    return Sampled(features, locations)


@triton.jit(do_not_specialize=["H", "W", "Ns", "Wk"])
def _sample_keys(
    tokens,
    queries,
    conv_weight,
    conv_bias,
    norm_weight,
    norm_bias,
    proj_weight,
    reference_points,
    reach,
    features,
    locations,
    H,
    W,
    Ns,
    Wk,
    C: tl.constexpr,
    channels: tl.constexpr,
    kernel: tl.constexpr,
    stride: tl.constexpr,
    eps: tl.constexpr,
    block_keys: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One program: a block of keys of one group of one image."""
    group = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, block_channels)
    in_group = channel < channels
    key = tl.program_id(0) * block_keys + tl.arange(0, block_keys)
    in_keys = key < Ns
    map_start = image * H * W * C + group * channels
    tokens += map_start
    queries += map_start

    mixed = tl.zeros((block_keys, block_channels), tl.float32)
    mixed += tl.load(conv_bias + channel, mask=in_group, other=0.0).to(tl.float32)[None, :]
    top = key // Wk * stride - kernel // 2
    left = key % Wk * stride - kernel // 2
    for tap_y in range(kernel):
        y = top + tap_y
        in_rows = in_keys & (y >= 0) & (y < H)
        # A row of taps is unrolled, so that its loads are under way together.
        for tap_x in tl.static_range(kernel):
            x = left + tap_x
            in_map = in_rows & (x >= 0) & (x < W)
            q = tl.load(
                queries + (y * W + x)[:, None] * C + channel[None, :],
                mask=in_map[:, None] & in_group[None, :],
                other=0.0,
            )
            weight = tl.load(
                conv_weight + channel * kernel * kernel + tap_y * kernel + tap_x,
                mask=in_group,
                other=0.0,
            )
            mixed += q.to(tl.float32) * weight.to(tl.float32)[None, :]

    centred = mixed - tl.sum(mixed, 1)[:, None] / channels
    centred = tl.where(in_group[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / channels
    scale = tl.load(norm_weight + channel, mask=in_group, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + channel, mask=in_group, other=0.0).to(tl.float32)
    normed = centred * tl.rsqrt(variance + eps)[:, None] * scale[None, :] + shift[None, :]
    active = 0.5 * normed * (1 + tl.erf(normed * 0.7071067811865476))
    to_y = tl.load(proj_weight + channel, mask=in_group, other=0.0).to(tl.float32)
    to_x = tl.load(proj_weight + channels + channel, mask=in_group, other=0.0).to(tl.float32)
    y = tl.load(reference_points + 2 * key, mask=in_keys, other=0.0)
    x = tl.load(reference_points + 2 * key + 1, mask=in_keys, other=0.0)
    y = _move(y, tl.sum(active * to_y[None, :], 1), reach)
    x = _move(x, tl.sum(active * to_x[None, :], 1), reach + 1 if reach is not None else None)
    locations += (image * tl.num_programs(1) + group) * Ns * 2
    tl.store(locations + 2 * key, y, mask=in_keys)
    tl.store(locations + 2 * key + 1, x, mask=in_keys)

    top, bottom, top_weight, bottom_weight = corners(y, H)
    left, right, left_weight, right_weight = corners(x, W)
    sampled = _read(tokens, top * W + left, top_weight * left_weight, channel, in_group, C)
    sampled += _read(tokens, top * W + right, top_weight * right_weight, channel, in_group, C)
    sampled += _read(tokens, bottom * W + left, bottom_weight * left_weight, channel, in_group, C)
    sampled += _read(tokens, bottom * W + right, bottom_weight * right_weight, channel, in_group, C)
    tl.store(
        features + (image * Ns + key)[:, None] * C + group * channels + channel[None, :],
        sampled.to(features.dtype.element_ty),
        mask=in_keys[:, None] & in_group[None, :],
    )


@triton.jit
def _move(reference, offset, reach):
    """Locations along one axis from raw offsets, as `move` of either family."""
    if reach is None:
        moved = reference + offset
        # Two selections, where a minimum would lose what is no number.
        moved = tl.where(moved < -1, -1.0, moved)
        moved = tl.where(moved > 1, 1.0, moved)
    else:
        decay = tl.exp(-2 * tl.abs(offset))
        size = (1 - decay) / (1 + decay)  # tanh, which Triton lacks
        moved = reference + tl.where(offset < 0, -size, size) * tl.load(reach)
    return moved


@triton.jit
def _read(tokens, cell, weight, channel, in_group, C: tl.constexpr):
    """Weighted channels `(keys, channels)` of one cell for each key, float32."""
    cells = tokens + cell[:, None] * C + channel[None, :]
    return weight[:, None] * tl.load(cells, mask=in_group[None, :], other=0.0).to(tl.float32)
