"""Resizing as in OpenMMLab's pipelines, for detectors and segmenters, and the way back.

An image keeps its aspect ratio. OpenCV's bilinear filter (fixed-point, not antialiased) is part
of what the official models compute. Knows nothing of files, requests or devices.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Fitting:
    """How one image is enlarged or shrunk to fit two sides, in either orientation.

    Attributes:
        image_size: `(H, W)` of the image, pixels.
        long_side: of the largest result, pixels.
        short_side: likewise.
    """

    image_size: tuple[int, int]
    long_side: int
    short_side: int

    @property
    def resized(self) -> tuple[int, int]:
        """`(H, W)` of the resized image, pixels."""
        factor = min(self.long_side / max(self.image_size), self.short_side / min(self.image_size))
        height, width = (int(side * factor + 0.5) for side in self.image_size)
        return height, width

    @property
    def scale_xy(self) -> tuple[float, float]:
        """By how much `(x, y)` the image is enlarged; the two differ by rounding, as float32."""
        (height, width), (new_height, new_width) = self.image_size, self.resized
        return float(np.float32(new_width / width)), float(np.float32(new_height / height))

    def to_image(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)` of the input to points `(..., 2)` of the image."""
        return np.asarray(points_xy, np.float64) / self.scale_xy

    def to_input(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)` of the image to points `(..., 2)` of the input."""
        return np.asarray(points_xy, np.float64) * self.scale_xy


def check_rgb(pixels: Any) -> None:
    """Check that this is an RGB image `(H, W, 3)`, NumPy's uint8, of at least one pixel.

    Raises:
        ValueError: it is not.
    """
    is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
    if not is_array or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        shape, kind = tuple(np.shape(pixels)), getattr(pixels, "dtype", type(pixels).__name__)
        raise ValueError(f"expected an RGB image (H, W, 3), NumPy's uint8; got {shape}, {kind}")


def resize_bilinear(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image `(H, W, 3)` to `(H', W', 3)` as OpenMMLab does.

    Raises:
        ValueError: it is no such image.
    """
    check_rgb(pixels)
    height, width = size
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
