"""From mask probabilities over a box to pixels of the original image, on the CPU.

As mmdetection 2.26 pastes masks: the centre of a pixel is looked up bilinearly among the centres
of the 28x28 cells, with zeros around them, so that a mask fades towards the edges of its box.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
    probabilities: NDArray[np.float32]

    @property
    def pixels(self) -> NDArray[np.bool_]:
        """The mask `(h, w)`."""
        return self.probabilities >= THRESHOLD


def paste(
    mask_probabilities: ArrayLike, boxes: ArrayLike, image_size: tuple[int, int]
) -> Iterator[PastedMask]:
    """Paste masks one by one, each into the part of the image around its box.

    Args:
        mask_probabilities: `(N, h, w)`, float32.
        boxes: `(N, 4)`, pixels of the image; a box without width or height covers nothing.
        image_size: `(H, W)` of the image, pixels.
    """
    H, W = image_size
    masks = np.asarray(mask_probabilities, np.float32)
    for probabilities, box in zip(masks, np.asarray(boxes).tolist(), strict=True):
        x1, y1, x2, y2 = box
        top, rows = _weights(y1, y2, H, probabilities.shape[0])
        left, columns = _weights(x1, x2, W, probabilities.shape[1])
        yield PastedMask(top, left, rows @ probabilities @ columns.T)


def paste_whole(
    mask_probabilities: ArrayLike, boxes: ArrayLike, image_size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Masks `(N, H, W)` of the whole image; for the arguments see `paste`."""
    whole = np.zeros((len(np.asarray(boxes)), *image_size), np.bool_)
    for target, mask in zip(whole, paste(mask_probabilities, boxes, image_size), strict=True):
        h, w = mask.pixels.shape
        target[mask.top : mask.top + h, mask.left : mask.left + w] = mask.pixels
    return whole


def _weights(start: float, end: float, size: int, cells: int) -> tuple[int, NDArray[np.float32]]:
    """How the pixels under a box read the cells of its mask, along one axis.

    Returns:
        The first pixel, and weights `(pixels, cells)`.
    """
    # A pixel whose centre is half a cell outside of the box still reads a little.
    reach = (end - start) / (2 * cells)
    first = min(max(int(start - reach), 0), size)
    stop = max(min(int(end + reach) + 1, size), first) if end > start else first
    centres = np.arange(first, stop, dtype=np.float32) + np.float32(0.5)
    position = (centres - np.float32(start)) / np.float32(max(end - start, 1e-9))
    cell = position * np.float32(cells) - np.float32(0.5)
    distance = np.abs(cell[:, None] - np.arange(cells, dtype=np.float32))
    return first, np.maximum(1 - distance, 0)
