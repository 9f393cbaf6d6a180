"""From mask probabilities over a box to pixels of the original image, on the CPU.

As mmdetection 2.26 pastes masks: the centre of a pixel is looked up bilinearly among the centres
of the 28x28 cells, with zeros around them, so that a mask fades towards the edges of its box.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 0.5  # the least probability of a pixel of the mask


@dataclass(frozen=True)
class PastedMask:
    """The part of an image that a mask can reach.

    Attributes:
        top: its first row, pixels.
        left: its first column, pixels.
        probabilities: `(h, w)`; outside they are zero.
    """

    top: int
    left: int
    probabilities: Tensor

    @property
    def pixels(self) -> Tensor:
        """The mask `(h, w)`."""
        return self.probabilities >= THRESHOLD


def paste(
    mask_probabilities: Tensor, boxes: Tensor, image_size: tuple[int, int]
) -> Iterator[PastedMask]:
    """Paste masks one by one, each into the part of the image around its box.

    Args:
        mask_probabilities: `(N, h, w)`.
        boxes: `(N, 4)`, pixels of the image; a box without width or height covers nothing.
        image_size: `(H, W)` of the image, pixels.
    """
    H, W = image_size
    for probabilities, box in zip(mask_probabilities, boxes.tolist(), strict=True):
        x1, y1, x2, y2 = box
        top, rows = _weights(y1, y2, H, probabilities.shape[0])
        left, columns = _weights(x1, x2, W, probabilities.shape[1])
        yield PastedMask(top, left, rows @ probabilities @ columns.T)


def paste_whole(mask_probabilities: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks `(N, H, W)` of the whole image; for the arguments see `paste`."""
    whole = torch.zeros((len(boxes), *image_size), dtype=torch.bool)
    for target, mask in zip(whole, paste(mask_probabilities, boxes, image_size), strict=True):
        h, w = mask.pixels.shape
        target[mask.top : mask.top + h, mask.left : mask.left + w] = mask.pixels
    return whole


def _weights(start: float, end: float, size: int, cells: int) -> tuple[int, Tensor]:
    """How the pixels under a box read the cells of its mask, along one axis.

    Returns:
        The first pixel, and weights `(pixels, cells)`.
    """
    # A pixel whose centre is half a cell outside of the box still reads a little.
    reach = (end - start) / (2 * cells)
    first = min(max(int(start - reach), 0), size)
    stop = max(min(int(end + reach) + 1, size), first) if end > start else first
    centres = torch.arange(first, stop, dtype=torch.float32) + 0.5
    position = (centres - start) / max(end - start, 1e-9) * cells - 0.5
    return first, (1 - (position[:, None] - torch.arange(cells)).abs()).clamp(min=0)
