"""Anchors: the boxes that the dense heads start from.

As in mmdetection 2.26: their centres are at the top-left corner of the cell, `index * stride`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

RATIOS = (0.5, 1.0, 2.0)  # height over width


@dataclass(frozen=True)
class Anchors:
    """The anchors of the levels of one pyramid.

    Attributes:
        strides: of the levels, pixels.
        scales: side of a square anchor, strides.
    """

    strides: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def per_cell(self) -> int:
        """How many anchors a cell has; their ratio changes slower than their scale."""
        return len(RATIOS) * len(self.scales)

    def at(self, level: int, width: int, index: Tensor) -> Tensor:
        """Boxes `(..., 4)` of the anchors with these indices, pixels of the padded image.

        Args:
            level: of the pyramid.
            width: of the map, cells.
            index: `(...)`, counting rows, then columns, then the anchors of a cell.
        """
        cell, kind = index // self.per_cell, index % self.per_cell
        centre_xy = torch.stack((cell % width, cell // width), -1) * self.strides[level]
        half = _sizes(self, level, index.device)[kind] / 2
        return torch.cat((centre_xy - half, centre_xy + half), -1)


@cache
def _sizes(anchors: Anchors, level: int, device: torch.device) -> Tensor:
    """Widths and heights `(per_cell, 2)`, pixels; on their device from the first call on."""
    with torch.inference_mode(mode=False):
        root = torch.tensor(RATIOS).sqrt()[:, None]
        scales = torch.tensor(anchors.scales) * anchors.strides[level]
        sizes = torch.stack((scales / root, scales * root), -1)
        return sizes.view(-1, 2).to(device)


RETINANET_ANCHORS = Anchors((8, 16, 32, 64, 128), (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)))
RPN_ANCHORS = Anchors((4, 8, 16, 32, 64), (8.0,))
