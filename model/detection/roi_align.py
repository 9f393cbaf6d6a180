"""RoIAlign: features of a box, resampled to a small square map.

He et al., "Mask R-CNN", arXiv:1703.06870, section 3, as mmcv 1.4 computes it with `aligned=True`
and `sampling_ratio=0`: every bin is the mean of about one bilinear sample for each cell that it
covers. Samples factor into rows and columns, so a bin is one weighted sum over the cells of a
rectangle, whose weights are products of a row's and a column's.

On CUDA a kernel computes it without a wait for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import usable

STRIDES = (4, 8, 16, 32)  # of the levels that boxes are read from
_FINEST_SIZE = 56  # pixels; a box of this size and up to twice as large is read from level 0


class _Taps(NamedTuple):
    """Which cells along one axis every bin of every box reads, and with what weights.

    Attributes:
        first: `(R, bins)`, the first cell.
        cells: `(R, bins)`, how many cells.
        start: `(R, bins)`, where their weights begin.
        weights: `(sum of cells,)`.
    """

    first: Tensor
    cells: Tensor
    start: Tensor
    weights: Tensor


def pooled_features(levels: Sequence[Tensor], boxes: Tensor, bins: int) -> Tensor:
    """Features of boxes, each from the level of the pyramid that fits its size.

    Args:
        levels: of the pyramid, `(B, H, W, C)`; the first four are read.
        boxes: `(B, R, 4)`, pixels of the padded images; one without width or height, or with a
            side that is no finite number, has zeros as features.
        bins: side of the result.

    Returns:
        `(B, R, bins, bins, C)`.
    """
    if usable(levels[0]):
        from model.kernels.roi_align import align  # noqa: PLC0415

        # The library that convolves chooses how the levels lie in memory.
        read = [level.contiguous() for level in levels[: len(STRIDES)]]
        return align(read, boxes.contiguous(), bins)
    B, R, _ = boxes.shape
    image_index = torch.arange(B, device=boxes.device).repeat_interleave(R)
    pooled = ragged_features(levels, boxes.flatten(0, 1), image_index, bins)
    return pooled.unflatten(0, (B, R))


def ragged_features(
    levels: Sequence[Tensor], boxes: Tensor, image_index: Tensor, bins: int
) -> Tensor:
    """The same for boxes of which the images have different numbers, in plain torch.

    Args:
        levels: of the pyramid, `(B, H, W, C)`; the first four are read.
        boxes: `(R, 4)`, pixels of the padded images.
        image_index: `(R,)`, the image of each box in the batch.
        bins: side of the result.

    Returns:
        `(R, bins, bins, C)`.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    real = ((size > 0) & size.isfinite()).all(-1, keepdim=True)
    boxes = boxes.masked_fill(~real, 0)
    level_index = level_of(boxes)
    pooled = levels[0].new_empty((len(boxes), bins, bins, levels[0].shape[-1]))
    for level, stride in enumerate(STRIDES):
        chosen = (level_index == level).nonzero().squeeze(1)
        aligned = roi_align(levels[level], boxes[chosen] / stride, image_index[chosen], bins)
        pooled[chosen] = aligned.to(pooled.dtype)
    return pooled


def level_of(boxes: Tensor) -> Tensor:
    """The level `(R,)` that boxes `(R, 4)` are read from, by the root of their area."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(-1)
    size = (width * height).sqrt()
    return (size / _FINEST_SIZE + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1).long()


def roi_align(features: Tensor, boxes: Tensor, image_index: Tensor, bins: int) -> Tensor:
    """Features of boxes.

    Args:
        features: `(B, H, W, C)`.
        boxes: `(R, 4)`, in cells, where the corner of the first cell is at 0; a box without
            width or height has zeros as features.
        image_index: `(R,)`.
        bins: side of the result.

    Returns:
        `(R, bins, bins, C)`, in the type of the boxes.
    """
    _, H, W, C = features.shape
    x1, y1, x2, y2 = (boxes - 0.5).unbind(-1)
    rows, columns = _taps(y1, y2 - y1, bins, H), _taps(x1, x2 - x1, bins, W)
    # Every pair of a bin's rows and columns is one entry of its bag: (R, bins, bins) bags.
    sizes = rows.cells[:, :, None] * columns.cells[:, None, :]
    corner = (image_index[:, None, None] * H + rows.first[:, :, None]) * W + columns.first[:, None]
    shape = sizes.shape
    per_bag = torch.stack(
        [
            part.expand(shape).flatten()
            for part in (
                columns.cells[:, None, :],
                corner,
                rows.start[:, :, None],
                columns.start[:, None, :],
            )
        ],
        -1,
    )
    sizes = sizes.flatten()
    offsets = sizes.cumsum(0) - sizes
    width, corner, row_start, column_start = per_bag.repeat_interleave(sizes, 0).unbind(-1)
    place = torch.arange(len(width), device=boxes.device) - offsets.repeat_interleave(sizes)
    row = place // width
    column = place - row * width
    weights = rows.weights[row_start + row] * columns.weights[column_start + column]
    pooled = F.embedding_bag(
        corner + row * W + column,
        features.reshape(-1, C).to(weights.dtype),
        offsets,
        per_sample_weights=weights,
        mode="sum",
    )
    return pooled.view(*shape, C)


def _taps(start: Tensor, length: Tensor, bins: int, size: int) -> _Taps:
    """Mean of the bilinear samples in every bin along an axis.

    Args:
        start: `(R,)`, in cells, where the centre of the first cell is at 0.
        length: `(R,)`, cells.
        bins: bins of a box.
        size: of the map, cells.
    """
    samples = (length / bins).ceil().long()  # of a bin
    bin_size = length / bins
    # One entry for each sample, box by box, bin by bin.
    bag_samples = samples.repeat_interleave(bins)
    bag = torch.arange(len(bag_samples), device=start.device).repeat_interleave(bag_samples)
    first_sample = bag_samples.cumsum(0) - bag_samples
    box, inside_bin = bag // bins, torch.arange(len(bag), device=start.device) - first_sample[bag]
    position = (
        start[box]
        + (bag % bins) * bin_size[box]
        + (inside_bin + 0.5) * bin_size[box] / samples[box]
    )
    weight = ((position >= -1) & (position <= size)) / samples[box]
    position = position.clamp(0, size - 1)
    cell = position.floor()
    upper = (position - cell) * weight
    cell = cell.long()
    # Cells of a bin from the one under its first sample to the one after its last.
    first = torch.full_like(bag_samples, size).scatter_reduce_(0, bag, cell, "amin")
    last = torch.zeros_like(bag_samples).scatter_reduce_(
        0, bag, (cell + 1).clamp(max=size - 1), "amax"
    )
    count = torch.where(bag_samples > 0, last - first + 1, 0)
    begin = count.cumsum(0) - count
    weights = position.new_zeros(int(count.sum()))
    tap = begin[bag] + cell - first[bag]
    weights.index_add_(0, tap, weight - upper)
    # At the last cell there is no next one, and nothing to add to it.
    weights.index_add_(0, tap + (cell < size - 1), upper)
    shape = (-1, bins)
    return _Taps(first.view(shape), count.view(shape), begin.view(shape), weights)
