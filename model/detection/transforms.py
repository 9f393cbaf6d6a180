"""The pre-processing of detectors, and the way back to the image.

The official one is that of mmdetection 2.26 with OpenCV: the image keeps its aspect ratio, is
enlarged or shrunk to fit 1333 x 800 in either orientation, and is padded to multiples of 32 with
the mean colour. OpenCV's bilinear filter (fixed-point, not antialiased) is part of the result.
A letterbox is the same with a square to fit, all of which is filled. Knows nothing of files,
requests or devices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.resizing import Fitting, resize_bilinear

LONG_SIDE, SHORT_SIDE = 1333, 800  # pixels
DIVISOR = 32


@dataclass(frozen=True)
class Resizing(Fitting):
    """How one image becomes the input of a detector.

    Attributes:
        square: whether every input is padded to a square of the long side.
    """

    long_side: int = LONG_SIDE
    short_side: int = SHORT_SIDE
    square: bool = False

    @classmethod
    def letterbox(cls, image_size: tuple[int, int], side: int) -> "Resizing":
        """Fit an image of `(H, W)` pixels into a square, whose side is a multiple of 32."""
        return cls(image_size, side, side, square=True)

    @property
    def padded(self) -> tuple[int, int]:
        """`(H, W)` of the input, pixels."""
        filled = (self.long_side, self.long_side) if self.square else self.resized
        height, width = (-(-side // DIVISOR) * DIVISOR for side in filled)
        return height, width

    @property
    def fits(self) -> bool:
        """Whether anything is left of the image, and the backbone can take the input.

        A map of one cell a side has no scale.
        """
        return min(self.resized) > 0 and min(self.padded) > DIVISOR


def to_model_pixels(
    pixels: NDArray[np.uint8], resizing: Resizing, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Resize an RGB image `(H, W, 3)` and pad it with zeros to the detector's input.

    Args:
        pixels: of the image.
        resizing: of the image.
        out: takes the result `(*resizing.padded, 3)`, if given.

    Raises:
        ValueError: the pixels are no such image.
    """
    height, width = resizing.resized
    padded = np.empty((*resizing.padded, 3), np.uint8) if out is None else out
    padded[:height, :width] = resize_bilinear(pixels, (height, width))
    padded[height:] = 0
    padded[:, width:] = 0
    return padded
