"""The official pre-processing of detectors, and the way back to the image.

As in mmdetection 2.26 with OpenCV: the image keeps its aspect ratio, is enlarged or shrunk to fit
1333 x 800 in either orientation, and is padded to multiples of 32 with the mean colour. OpenCV's
bilinear filter (fixed-point, not antialiased) is part of the result. Knows nothing of files,
requests or devices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
LONG_SIDE, SHORT_SIDE = 1333, 800  # pixels
DIVISOR = 32

_COEFFICIENT_BITS = 11
_ONE = 1 << _COEFFICIENT_BITS


@dataclass(frozen=True)
class Resizing:
    """How one image becomes the input of a detector.

    Attributes:
        image_size: `(H, W)` of the image, pixels.
        long_side: of the largest input, pixels.
        short_side: likewise.
    """

    image_size: tuple[int, int]
    long_side: int = LONG_SIDE
    short_side: int = SHORT_SIDE

    @property
    def resized(self) -> tuple[int, int]:
        """`(H, W)` of the resized image, pixels."""
        factor = min(self.long_side / max(self.image_size), self.short_side / min(self.image_size))
        height, width = (int(side * factor + 0.5) for side in self.image_size)
        return height, width

    @property
    def padded(self) -> tuple[int, int]:
        """`(H, W)` of the input, pixels."""
        height, width = (-(-side // DIVISOR) * DIVISOR for side in self.resized)
        return height, width

    @property
    def fits(self) -> bool:
        """Whether the backbone can take the input: a map of one cell a side has no scale."""
        return min(self.padded) > DIVISOR

    @property
    def scale_xy(self) -> tuple[float, float]:
        """By how much `(x, y)` the image is enlarged; the two differ by rounding, as float32."""
        (height, width), (new_height, new_width) = self.image_size, self.resized
        return float(np.float32(new_width / width)), float(np.float32(new_height / height))

    def to_image(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)` of the input to points `(..., 2)` of the image."""
        return np.asarray(points_xy, np.float64) / self.scale_xy


def to_model_pixels(pixels: NDArray[np.uint8], resizing: Resizing) -> NDArray[np.uint8]:
    """Resize an RGB image `(H, W, 3)` and pad it with zeros to the detector's input."""
    height, width = resizing.resized
    padded = np.zeros((*resizing.padded, 3), np.uint8)
    padded[:height, :width] = resize_bilinear(pixels, (height, width))
    return padded


def resize_bilinear(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image `(H, W, C)` to `(H', W', C)` with the very arithmetic of OpenCV.

    That is `cv2.resize(..., interpolation=cv2.INTER_LINEAR)`: weights of 11 bits, first along the
    rows, then along the columns, where the products lose 4 and 16 bits before they are added. An
    exact halving is the mean of 2x2 pixels there.
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    if (height, width) == (2 * size[0], 2 * size[1]):
        wide = pixels.astype(np.uint16)
        total = wide[0::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 0::2] + wide[1::2, 1::2]
        return ((total + 2) >> 2).astype(np.uint8)
    row_position, column_position = _positions(height, size[0]), _positions(width, size[1])
    # Beyond the first and last row the products of both weights are cut off, beyond the first
    # and last column there is one weight.
    column_position = column_position.clip(0, width - 1)
    (left, right), (first, second) = _taps(column_position, width)
    read, row_weights = _taps(row_position, height)
    # A reduction does not read every row.
    used, (top, bottom) = np.unique(read, return_inverse=True)
    lines = pixels[used]
    rows = (lines[:, left] * first[:, None] + lines[:, right] * second[:, None]) >> 4
    first, second = row_weights
    total = rows[top] * first[:, None, None] >> 16
    total += rows[bottom] * second[:, None, None] >> 16
    return ((total + 2) >> 2).astype(np.uint8)


def _positions(size: int, new_size: int) -> NDArray[np.float32]:
    """Where the centres of the new pixels lie, counted in pixels from the centre of the first."""
    scale = 1 / (new_size / size)
    return ((np.arange(new_size) + 0.5) * scale - 0.5).astype(np.float32)


def _taps(position: NDArray[np.float32], size: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The two pixels `(2, n)` around each position along an axis, and their weights `(2, n)`."""
    first = np.floor(position)
    fraction = position - first
    weights = np.rint(np.stack((1 - fraction, fraction)) * np.float32(_ONE))
    pixels = np.stack((first, first + 1)).astype(np.int64).clip(0, size - 1)
    return pixels, weights.astype(np.int32)


class Normalise(nn.Module):
    """Bytes to a detector's input, on the device that holds them.

    Move this module with `.to(device)` only: `.to(dtype)` would round the mean and the deviation.

    Args:
        dtype: of the result.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        inverse = 1 / torch.tensor(STD, dtype=torch.float64)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", inverse.float().view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, resized_sizes: Tensor) -> Tensor:
        """Normalise a batch of bytes, and fill the padding with the mean colour, zero.

        Args:
            pixels: `(B, H, W, 3)`, RGB.
            resized_sizes: `(B, 2)`, `(H, W)` of the images without padding, pixels.

        Returns:
            `(B, 3, H, W)`, in the memory order of the bytes (`torch.channels_last`).
        """
        _, H, W, _ = pixels.shape
        height, width = resized_sizes.view(-1, 2, 1, 1, 1).unbind(1)
        row = torch.arange(H, device=pixels.device).view(H, 1)
        column = torch.arange(W, device=pixels.device)
        inside = (row < height) & (column < width)  # (B, 1, H, W)
        images = (pixels.permute(0, 3, 1, 2).float() - self.mean) * self.inverse_std
        return torch.where(inside, images, 0).to(self.dtype)
