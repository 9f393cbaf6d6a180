"""Images that come as arrays of pixels, decoded by whoever sent them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.transforms import MEAN, STD
from service.errors import InvalidImage

# How far normalised values may lie outside of all pixels, levels: filters overshoot at edges.
_OVERSHOOT = 64


@dataclass(frozen=True, eq=False)
class RawPixels:
    """An image as pixels.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes, upright.
    """

    pixels: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        """`(H, W)`, pixels."""
        height, width, _ = self.pixels.shape
        return height, width


@dataclass(frozen=True, eq=False)
class NormalisedPixels:
    """An image as the values that a network reads: `(pixel / 255 - mean) / std` of ImageNet.

    Pixels are bytes on their way to the device, which normalises them again. So what stands for a
    byte gives the same answer, and anything between is rounded to one.

    Attributes:
        values: `(3, H, W)`, RGB.
    """

    values: NDArray[np.float32]

    @property
    def size(self) -> tuple[int, int]:
        """`(H, W)`, pixels."""
        _, height, width = self.values.shape
        return height, width

    def fill(self, out: NDArray[np.uint8]) -> None:
        """Write the pixels `(H, W, 3)` to an array.

        Raises:
            InvalidImage: there are values that no pixel could have.
        """
        scale, start = (np.array(of_channels, np.float32) * 255 for of_channels in (STD, MEAN))
        with np.errstate(all="ignore"):  # what is no number is refused below
            levels = self.values.transpose(1, 2, 0) * scale
            levels += start
            least, most = float(levels.min(initial=0)), float(levels.max(initial=0))
        if not (least >= -_OVERSHOOT and most <= 255 + _OVERSHOOT):  # nor where one is no number
            raise InvalidImage(
                "unsupported",
                f"the values are not those of a normalised image: they stand for pixels from "
                f"{least:.4g} to {most:.4g}; expected 0 to 255. Normalise with (pixel / 255 - mean)"
                f" / std, where the mean is {MEAN} and std {STD}",
            )
        np.rint(levels, levels)
        np.clip(levels, 0, 255, levels)
        out[...] = levels


RawImage = RawPixels | NormalisedPixels
