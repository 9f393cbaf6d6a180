"""Boxes as corners `(x1, y1, x2, y2)` in pixels, and as deltas from another box.

The coding is that of Girshick et al., "R-CNN", arXiv:1311.2524, appendix C, with widths
`x2 - x1`.
"""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

LARGEST_GROWTH = abs(log(16 / 1000))  # of the logarithm of a side


def decode(boxes: Tensor, deltas: Tensor, limits: Tensor, stds: Sequence[float] = ()) -> Tensor:
    """Move and scale boxes by what a head predicts, and clip them to the image.

    Args:
        boxes: `(..., 4)`.
        deltas: `(..., 4)`: `(dx, dy)` in sides of the box, `(dw, dh)` as logarithms.
        limits: `(..., 2)`, `(x, y)`: the largest coordinates.
        stds: four factors of the deltas; empty for 1.

    Returns:
        Boxes of the shape that boxes and deltas have together.
    """
    if stds:
        deltas = deltas * deltas.new_tensor(stds)
    start, end = boxes.split(2, -1)
    shift, growth = deltas.split(2, -1)
    size = end - start
    centre = (start + end) * 0.5 + size * shift
    half = size * growth.clamp(-LARGEST_GROWTH, LARGEST_GROWTH).exp() * 0.5
    return torch.cat(
        [torch.minimum(corner.clamp(min=0), limits) for corner in (centre - half, centre + half)],
        -1,
    )


def xy_pairs(scale_xy: Tensor) -> Tensor:
    """Factors `(..., 2)` of x and y as factors `(..., 4)` of the corners of boxes."""
    return torch.cat((scale_xy, scale_xy), -1)
