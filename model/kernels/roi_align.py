"""RoIAlign over the levels of a pyramid, for any number of boxes in one launch.

The reference is `model.detection.roi_align.pooled_features`. Here the number of samples of a box
is the length of loops inside a program, so that nothing depends on the boxes but the time it
takes: neither a shape nor a launch.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

VALUES = 2048  # of a program: the bins of a row, times channels
WARPS = 4


def align(levels: Sequence[Tensor], boxes: Tensor, bins: int) -> Tensor:
    """Features of boxes, each from the level of the pyramid that fits its size.

    Positions and sums are float32 whatever the dtype of the features. A box may lie anywhere;
    one without width or height, or with a side that is no finite number, has zeros as features.

    Args:
        levels: four of the pyramid, `(B, H, W, C)`, with strides 4, 8, 16 and 32.
        boxes: `(B, R, 4)`, pixels of the padded images, float32.
        bins: side of the result.

    Returns:
        `(B, R, bins, bins, C)`, in the dtype of the levels.
    """
    assert all(tensor.is_contiguous() for tensor in (*levels, boxes)), "this is a bug"
    B, R, _ = boxes.shape
    C = levels[0].shape[-1]
    pooled = levels[0].new_empty(B, R, bins, bins, C)
    block_bins = triton.next_power_of_2(bins)
    block_channels = min(triton.next_power_of_2(C), VALUES // block_bins)
    sizes = [side for level in levels for side in level.shape[1:3]]
    # No box is no program, which is no launch.
    if B * R:
        _roi_align[B * R * bins, triton.cdiv(C, block_channels)](
            *levels,
            boxes,
            pooled,
            *sizes,
            R,
            C=C,
            bins=bins,
            block_bins=block_bins,
            block_channels=block_channels,
            num_warps=WARPS,
            num_stages=1,
        )
    return pooled


@triton.jit(do_not_specialize=["H4", "W4", "H8", "W8", "H16", "W16", "H32", "W32", "R"])
def _roi_align(
    stride4,
    stride8,
    stride16,
    stride32,
    boxes,
    pooled,
    H4,
    W4,
    H8,
    W8,
    H16,
    W16,
    H32,
    W32,
    R,
    C: tl.constexpr,
    bins: tl.constexpr,
    block_bins: tl.constexpr,
    block_channels: tl.constexpr,
):
    """One program: a row of bins of one box, and a block of channels."""
    region = (tl.program_id(0) // bins).to(tl.int64)
    bin_row = tl.program_id(0) % bins
    bin_column = tl.arange(0, block_bins)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    mask = (bin_column < bins)[:, None] & (channel < C)[None, :]

    boxes += region * 4
    x1, y1 = tl.load(boxes), tl.load(boxes + 1)
    x2, y2 = tl.load(boxes + 2), tl.load(boxes + 3)
    # The rounding is that of the reference, for it decides the level and the number of samples.
    size = tl.div_rn(tl.sqrt_rn(tl.maximum((x2 - x1) * (y2 - y1), 0.0)), 56.0) + 1e-6
    features, H, W, scale = stride4, H4, W4, 0.25
    if size >= 2:
        features, H, W, scale = stride8, H8, W8, 0.125
    if size >= 4:
        features, H, W, scale = stride16, H16, W16, 0.0625
    if size >= 8:
        features, H, W, scale = stride32, H32, W32, 0.03125
    # From here on in cells, where the centre of the first cell is at 0.
    x1, y1, x2, y2 = x1 * scale - 0.5, y1 * scale - 0.5, x2 * scale - 0.5, y2 * scale - 0.5
    bin_width = tl.div_rn(x2 - x1, bins * 1.0)
    bin_height = tl.div_rn(y2 - y1, bins * 1.0)

    mixed = tl.zeros((block_bins, block_channels), tl.float32)
    # None of the comparisons holds for NaN.
    if (bin_height > 0) & (bin_width > 0) & (bin_height + bin_width < float("inf")):
        mixed = _means(
            features + region // R * H * W * C + channel[None, :],
            y1 + bin_row * bin_height,
            x1 + bin_column * bin_width,
            bin_height,
            bin_width,
            H,
            W,
            mask,
            C,
        )
    pooled += ((region * bins + bin_row) * bins + bin_column)[:, None] * C + channel[None, :]
    tl.store(pooled, mixed.to(pooled.dtype.element_ty), mask=mask)


@triton.jit
def _means(features, top, left, bin_height, bin_width, H, W, mask, C: tl.constexpr):
    """Means of the samples of bins side by side, float32, of the shape of the mask.

    Args:
        features: of the first cell of an image, for each channel.
        top: where the bins begin.
        left: where each of them begins, `(bins,)`.
        bin_height: cells, above 0.
        bin_width: cells, above 0.
        H: rows of the map.
        W: columns of the map.
        mask: `(bins, channels)`, which there are.
        C: channels of the map.
    """
    rows, columns = tl.ceil(bin_height), tl.ceil(bin_width)  # of samples
    row_step, column_step = bin_height / rows, bin_width / columns
    top += 0.5 * row_step
    left += 0.5 * column_step
    # Rows of cells, each once, with what all rows of samples give it.
    row = _inside(top, H).to(tl.int32)
    last_row = tl.minimum(_inside(top + (rows - 1) * row_step, H).to(tl.int32) + 1, H - 1)
    # Columns of samples. A box may be far larger than the map: those that can reach it are between
    # -1 and `W`, and at least half a cell apart.
    first_column = tl.maximum(tl.floor((-1 - left) / column_step), 0.0)
    columns_read = tl.minimum(columns, 2.0 * W + 6).to(tl.int32)
    mixed = tl.zeros(mask.shape, tl.float32)
    while row <= last_row:
        cells = features + row * W * C
        mixed_row = tl.zeros(mask.shape, tl.float32)
        for index in range(columns_read):
            column = first_column + index
            x = left + column * column_step
            counts = (column < columns) & (x >= -1) & (x <= W)
            x = _inside(x, W)
            first = tl.floor(x)
            upper = tl.where(counts, x - first, 0.0)
            lower = tl.where(counts, 1.0, 0.0) - upper
            first = first.to(tl.int32)
            second = tl.minimum(first + 1, W - 1)
            before = tl.load(cells + first[:, None] * C, mask=mask, other=0.0)
            after = tl.load(cells + second[:, None] * C, mask=mask, other=0.0)
            mixed_row += lower[:, None] * before + upper[:, None] * after
        mixed += _weight_of_row(row, top, row_step, rows, H) * mixed_row
        row += 1
    return mixed / rows / columns


@triton.jit
def _inside(position, size):
    """The nearest position between the first and the last cell."""
    return tl.minimum(tl.maximum(position, 0.0), size - 1.0)


@triton.jit
def _weight_of_row(row, first, step, samples, size):
    """What a row of cells takes of all rows of samples of a bin, of which each gives one.

    Args:
        row: index of the cells.
        first: position of the first sample.
        step: from one sample to the next, at most one cell; of several, at least half.
        samples: their number, float32.
        size: rows of the map.
    """
    # Those that a row can take are less than two cells apart, and so at most five.
    sample = tl.maximum(tl.floor((row - 1 - first) / step), 0.0) + tl.arange(0, 8)
    y = first + sample * step
    counts = (sample < samples) & (y >= -1) & (y <= size)
    distance = tl.abs(_inside(y, size) - row)
    return tl.sum(tl.where(counts, tl.maximum(1 - distance, 0.0), 0.0))
