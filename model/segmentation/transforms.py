"""The pre-processing of segmenters, and the way back to the image.

The official one is that of mmsegmentation 0.29 with OpenCV: the image keeps its aspect ratio and is
enlarged or shrunk to fit 2048 x 512 in either orientation. Nothing else: the network sees all of
the resized image and no padding, whatever its sides. Colours are normalised as those of the
classifiers (`model.normalise`). Knows nothing of files, requests or devices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.resizing import Fitting, resize_bilinear

LONG_SIDE, SHORT_SIDE = 2048, 512  # pixels
ONE_CELL = 32  # pixels of a side that leave one cell of the last map


@dataclass(frozen=True)
class Resizing(Fitting):
    """How one image becomes the input of a segmenter."""

    long_side: int = LONG_SIDE
    short_side: int = SHORT_SIDE

    @property
    def fits(self) -> bool:
        """Whether the backbone can take the input.

        A map of one cell a side has no scale: officially all its values are NaN, and every pixel
        is of the first class.
        """
        return min(self.resized) > ONE_CELL

    @property
    def misfit(self) -> str:
        """A sentence that says why it does not fit."""
        (height, width), (new_height, new_width) = self.image_size, self.resized
        return (
            f"an image of {width}x{height} pixels becomes an input of {new_width}x{new_height}, "
            f"and a segmenter needs more than {ONE_CELL} pixels a side: crop the image"
        )


def to_model_pixels(
    pixels: NDArray[np.uint8], resizing: Resizing, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Resize an RGB image `(H, W, 3)` to the segmenter's input `(*resizing.resized, 3)`.

    Args:
        pixels: of the image.
        resizing: of the image.
        out: takes the result, if given.

    Raises:
        ValueError: the pixels are no such image, or a side would be left with 32 pixels or less.
    """
    if not resizing.fits:
        raise ValueError(resizing.misfit)
    resized = resize_bilinear(pixels, resizing.resized)
    if out is None:
        return resized
    out[...] = resized
    return out
