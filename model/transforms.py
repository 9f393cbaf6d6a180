"""The official evaluation pre-processing, and the way back from its pixels to the image's.

As in github.com/LeapLabTHU/DAT (`data/build.py`): the aspect ratio is not kept, and Pillow's
antialiased bicubic filter with its rounding to bytes is part of the result. Knows nothing of
files, requests or devices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor, nn

from model.config import DatConfig

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelMap:
    """Where the pixels of the model's input lie in the image it was made from.

    In both spaces a point is `(x, y)` in pixels from the top-left corner of the top-left
    pixel, so that the centre of a pixel is at +0.5.

    Attributes:
        offset: `(x, y)` of the crop in the resized image, pixels of the model's input.
        scale: `(x, y)`, pixels of the image per pixel of the model's input.
    """

    offset: tuple[int, int]
    scale: tuple[float, float]

    def to_image(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)` of the model's input to points `(..., 2)` of the image."""
        return (np.asarray(points_xy, np.float64) + self.offset) * self.scale


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of one model: resized, then cropped at the centre.

    Attributes:
        image_size: `(H, W)` of the model's input, pixels.
        resize_to: `(H, W)` of the whole image before the crop, pixels.
    """

    image_size: tuple[int, int]
    resize_to: tuple[int, int]

    @classmethod
    def of(cls, config: DatConfig) -> "Preprocessing":
        """The pre-processing that the published accuracy of a model was measured with."""
        height, width = config.image_size
        if not config.crop:
            return cls(config.image_size, config.image_size)
        return cls(config.image_size, (int(256 / 224 * height), int(256 / 224 * width)))

    @property
    def crop_offset(self) -> tuple[int, int]:
        """`(top, left)` of the crop in the resized image, pixels."""
        # round() as in torchvision's CenterCrop: a half goes to the even neighbour
        top, left = (
            round((whole - part) / 2)
            for whole, part in zip(self.resize_to, self.image_size, strict=True)
        )
        return top, left

    def pixel_map(self, width: int, height: int) -> PixelMap:
        """The way back to an image of `width` x `height` pixels."""
        top, left = self.crop_offset
        return PixelMap((left, top), (width / self.resize_to[1], height / self.resize_to[0]))


def to_model_pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop an RGB image to the model's input, `(H, W, 3)`, contiguous."""
    # Not one resize with box=: Pillow then rounds the box to float32 and may swap the order of
    # its two passes, and the result is off by up to 25 levels for some image sizes.
    (height, width), (top, left) = preprocessing.image_size, preprocessing.crop_offset
    resized = image.resize(preprocessing.resize_to[::-1], Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + width, top + height)))


class Normalise(nn.Module):
    """Bytes `(B, H, W, 3)` to the model's input `(B, 3, H, W)`, on the device that holds them.

    The arithmetic is float32 in the official order; only the result is cast to `dtype`. The
    result keeps the memory order of the bytes (`torch.channels_last`). Move this module with
    `.to(device)` only: `.to(dtype)` would round the mean and the deviation.

    Args:
        dtype: of the result.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise a batch of bytes."""
        images = pixels.permute(0, 3, 1, 2).float() / 255
        return ((images - self.mean) / self.std).to(self.dtype)
