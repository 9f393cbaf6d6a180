"""Resizing as in OpenMMLab's pipelines, for detectors and segmenters.

An image keeps its aspect ratio. OpenCV's bilinear filter (fixed-point, not antialiased) is part
of what the official models compute. Knows nothing of files, requests or devices.
"""

import cv2
import numpy as np
from numpy.typing import NDArray


def fitted_size(image_size: tuple[int, int], long_side: int, short_side: int) -> tuple[int, int]:
    """`(H, W)` of the largest image of this shape that fits two sides in either orientation."""
    factor = min(long_side / max(image_size), short_side / min(image_size))
    height, width = (int(side * factor + 0.5) for side in image_size)
    return height, width


def resize_bilinear(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an RGB image `(H, W, 3)` to `(H', W', 3)` as OpenMMLab does."""
    height, width = size
    return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
