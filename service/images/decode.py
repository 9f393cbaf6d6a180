"""Untrusted bytes to upright RGB pixels, within limits.

Pillow releases the interpreter lock while it decodes and resizes, and nothing here is shared,
so that threads of one process run these functions in parallel.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The plugin is imported to be registered: Image.open would otherwise load every plugin of
# Pillow at the first WebP image.
from PIL import Image, WebPImagePlugin  # noqa: F401

from model.transforms import PixelMap, Preprocessing, to_model_pixels
from service.errors import ImageTooLarge, InvalidImage
from service.images.containers import Container, read_container
from service.images.raw import NormalisedPixels, RawImage, RawPixels
from service.settings.limits import Limits

# The largest side of a JPEG. Resizing takes about 32 bytes for each pixel of a side: a PNG of
# 50 000 000 x 1 pixels, a few kB, would take 1.6 GB.
_MAX_SIDE = 65_535


# An array for pixels of a shape.
Empty = Callable[[tuple[int, ...]], NDArray[np.uint8]]
# An image as it came: the bytes of a file, or an array.
Source = bytes | RawImage


@dataclass(frozen=True)
class PreparedImage:
    """One image, ready for the model.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes of the model's input size, contiguous.
        width: of the upright image, pixels.
        height: of the upright image, pixels.
        pixel_map: from the model's input to the upright image.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    pixel_map: PixelMap


def decode(source: Source, limits: Limits) -> Image.Image:
    """Decode a JPEG, PNG or WebP image to RGB, upright.

    Equal to Pillow's `convert("RGB")` (alpha is dropped, an animation is its first frame),
    except that the EXIF orientation is applied and that greyscale of 16 bits is scaled to 8
    where Pillow clips it.

    Raises:
        ImageTooLarge: more bytes or pixels than the limits allow; nothing was decoded.
        InvalidImage: the bytes are not a usable image, or the values not those of one.
    """
    if not isinstance(source, bytes):
        return Image.fromarray(_pixels_of(source, limits))
    container = _read_container(source, limits)
    return _upright(_decode_pixels(container), container.orientation)


def decode_pixels(source: Source, limits: Limits) -> NDArray[np.uint8]:
    """Decode an image as `decode` does, to its pixels `(H, W, 3)`; those of an array are its own.

    Raises:
        ImageTooLarge: as `decode`.
        InvalidImage: as `decode`.
    """
    if not isinstance(source, bytes):
        return _pixels_of(source, limits)
    return np.asarray(decode(source, limits))


def decode_at(data: bytes, limits: Limits, size: tuple[int, int]) -> Image.Image:
    """Decode an image as `decode` does, and resize it to `(W, H)` pixels, upright.

    A JPEG that is much larger is decoded at a half, a quarter or an eighth of its size.

    Raises:
        ImageTooLarge: as `decode`.
        InvalidImage: as `decode`.
    """
    container = _read_container(data, limits)
    orientation = container.orientation
    image = _upright(_decode_pixels(container, _turned(size, orientation)), orientation)
    upright_size = _turned((container.width, container.height), orientation)
    covered = _covered(image, upright_size, orientation)
    if covered is None and image.size == size:
        return image
    return image.resize(size, Image.Resampling.LANCZOS, covered)


def prepare(
    source: Source, limits: Limits, preprocessing: Preprocessing, empty: Empty | None = None
) -> PreparedImage:
    """Decode an image and make it the input of a model; what the decode threads run.

    Normalised values are the input of the model already.

    Args:
        source: the upload.
        limits: of the server.
        preprocessing: of the model.
        empty: where the pixels go, by their shape; without it into an array of their own.

    Raises:
        ImageTooLarge: as `decode`.
        InvalidImage: as `decode`.
    """
    if not isinstance(source, bytes):
        return _prepare_raw(source, limits, preprocessing, empty)
    container = _read_container(source, limits)
    orientation = container.orientation
    fast = limits.decode == "fast"
    least_size = _turned(preprocessing.resize_to[::-1], orientation) if fast else None
    image = _upright(_decode_pixels(container, least_size), orientation)
    width, height = _turned((container.width, container.height), orientation)
    covered = _covered(image, (width, height), orientation)
    out = empty and empty((*preprocessing.image_size, 3))
    return PreparedImage(
        to_model_pixels(image, preprocessing, covered, out),
        width,
        height,
        preprocessing.pixel_map(width, height),
    )


def _prepare_raw(
    image: RawImage, limits: Limits, preprocessing: Preprocessing, empty: Empty | None
) -> PreparedImage:
    height, width = _size_of(image, limits)
    model_size = preprocessing.image_size
    is_input = isinstance(image, NormalisedPixels)
    if is_input and image.size != model_size:
        raise InvalidImage(
            "unsupported",
            f"the normalised image has {width}x{height} pixels; expected the size of the model's "
            f"input, {model_size[1]}x{model_size[0]}",
        )
    out = empty and empty((*model_size, 3))
    pixels = np.empty((*model_size, 3), np.uint8) if out is None else out
    if isinstance(image, NormalisedPixels):
        image.fill(pixels)
    elif image.size == preprocessing.resize_to:
        top, left = preprocessing.crop_offset
        rows, columns = model_size
        pixels[...] = image.pixels[top : top + rows, left : left + columns]
    else:
        to_model_pixels(Image.fromarray(image.pixels), preprocessing, out=pixels)
    pixel_map = PixelMap((0, 0), (1, 1)) if is_input else preprocessing.pixel_map(width, height)
    return PreparedImage(pixels, width, height, pixel_map)


def _pixels_of(image: RawImage, limits: Limits) -> NDArray[np.uint8]:
    height, width = _size_of(image, limits)
    if isinstance(image, RawPixels):
        return image.pixels
    pixels = np.empty((height, width, 3), np.uint8)
    image.fill(pixels)
    return pixels


def _size_of(image: RawImage, limits: Limits) -> tuple[int, int]:
    height, width = image.size
    if not width * height:
        raise InvalidImage("empty", f"the image has {width}x{height} pixels")
    _check_size(width, height, limits)
    return height, width


def _read_container(data: bytes, limits: Limits) -> Container:
    if len(data) > limits.max_image_bytes:
        raise ImageTooLarge(
            "too_large",
            f"the image has {len(data)} bytes; the limit is {limits.max_image_bytes}",
        )
    container = read_container(data)
    _check_size(container.width, container.height, limits)
    return container


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            "too_many_pixels",
            f"the image has {width}x{height} pixels; the limit is {limits.max_pixels}",
        )
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLarge(
            "too_many_pixels",
            f"the image has {width}x{height} pixels; a side may have {_MAX_SIDE}",
        )


def _decode_pixels(container: Container, least_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode to RGB, as stored.

    Args:
        container: of the image.
        least_size: `(W, H)`, pixels. A JPEG is decoded at a half, a quarter or an eighth of its
            size, rounded up, where that is as large as this; its lower frequencies suffice.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(container.data), formats=[container.format])
        # The limits hold for the size that the container gave; it must be the decoder's too.
        if image.size != (container.width, container.height):
            raise InvalidImage("corrupt", f"the {container.format} image gives two sizes")
        if least_size is not None:
            image.draft(None, least_size)
        image.load()
    except OSError as error:
        raise InvalidImage("corrupt", f"the {container.format} data cannot be decoded") from error
    if image.mode == "I;16":
        high_bytes = (np.asarray(image) >> 8).astype(np.uint8)
        image = Image.fromarray(high_bytes)
    return image if image.mode == "RGB" else image.convert("RGB")


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where the first stored pixel is in the upright image (Exif 2.3, 4.6.4).
_STARTS_AT_THE_RIGHT, _STARTS_AT_THE_BOTTOM = {2, 3, 6, 7}, {3, 4, 7, 8}


def _turned(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """`(W, H)` of the upright image from that of the stored one, and the other way round."""
    return size if orientation < 5 else size[::-1]


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _covered(
    image: Image.Image, size: tuple[int, int], orientation: int
) -> tuple[float, float, float, float] | None:
    """Where a picture of `(W, H)` pixels lies in the upright image that was decoded from it.

    `None` where nothing was reduced. Else the picture ends somewhere in the last pixel of each
    side, counted as they are stored.
    """
    if image.size == size:
        return None
    reduction = round(size[0] / image.width)
    width, height = size[0] / reduction, size[1] / reduction
    left = image.width - width if orientation in _STARTS_AT_THE_RIGHT else 0
    top = image.height - height if orientation in _STARTS_AT_THE_BOTTOM else 0
    return left, top, left + width, top + height
