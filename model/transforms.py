"""The official evaluation pre-processing, and the way back from its pixels to the image's.

As in github.com/LeapLabTHU/DAT (`data/build.py`): the aspect ratio is not kept, and Pillow's
antialiased bicubic filter with its rounding to bytes is part of the result. Knows nothing of
files, requests or devices.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from model.config import DatConfig
from model.swin_config import SwinConfig

# Of ImageNet, for each of the channels R, G and B from 0 to 1.
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

    def to_input(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)` of the image to points `(..., 2)` of the model's input."""
        return np.asarray(points_xy, np.float64) / self.scale - self.offset


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
    def of(cls, config: DatConfig | SwinConfig) -> "Preprocessing":
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

    def pixel_map(self, width: float, height: float) -> PixelMap:
        """The way back to an image of `width` x `height` pixels."""
        top, left = self.crop_offset
        return PixelMap((left, top), (width / self.resize_to[1], height / self.resize_to[0]))


def to_model_pixels(
    image: Image.Image,
    preprocessing: Preprocessing,
    covered: tuple[float, float, float, float] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Resize and crop an RGB image to the model's input, `(H, W, 3)`, contiguous.

    Args:
        image: any size.
        preprocessing: of the model.
        covered: `(left, top, right, bottom)` of the picture in the image, pixels. Without it the
            image is the picture, and the result the official one bit for bit.
        out: takes the result, if given.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image; got the mode {image.mode}: image.convert('RGB')")
    resized = _resize_and_crop(image, preprocessing, covered)
    if out is None:
        return np.array(resized)
    out[...] = np.asarray(resized)
    return out


def _resize_and_crop(
    image: Image.Image,
    preprocessing: Preprocessing,
    covered: tuple[float, float, float, float] | None,
) -> Image.Image:
    if covered is None and not _is_exact_in_one(image.size, preprocessing):
        (height, width), (top, left) = preprocessing.image_size, preprocessing.crop_offset
        resized = image.resize(preprocessing.resize_to[::-1], Image.Resampling.BICUBIC)
        return resized.crop((left, top, left + width, top + height))
    start_x, start_y, end_x, end_y = covered or (0, 0, *image.size)
    height, width = preprocessing.image_size
    pixel_map = preprocessing.pixel_map(end_x - start_x, end_y - start_y)
    (left, top), (right, bottom) = pixel_map.to_image([(0, 0), (width, height)])
    box = start_x + left, start_y + top, start_x + right, start_y + bottom
    return image.resize((width, height), Image.Resampling.BICUBIC, box)


def _is_exact_in_one(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Whether Pillow gives the same bytes when it computes no more than the crop.

    It rounds the box of a crop to float32. Where the whole is a power of two, as 256 is, nothing
    is lost by that for any side below 2**20, and the arithmetic that follows is exact too.
    Elsewhere the filter moves a little, and some bytes change.

    The bytes between its two passes are rounded, so the order of the passes must be the same.
    """
    powers_of_two = all(whole.bit_count() == 1 for whole in preprocessing.resize_to)
    return powers_of_two and _begins_with_columns(size, preprocessing.resize_to) == (
        _begins_with_columns(size, preprocessing.image_size)
    )


def _begins_with_columns(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow shrinks the height first; before version 13 it never does.

    See `ImagingResampleInner` in github.com/python-pillow/Pillow (`src/libImaging/Resample.c`).
    """
    fewer_columns, fewer_rows = size[0] - target[1], size[1] - target[0]
    return fewer_rows > max(0, 2 * fewer_columns)
