"""Images that come as arrays are those that files would hold."""

import io

import numpy as np
import pytest
from PIL import Image

from model import VARIANTS
from model.transforms import MEAN, STD, Preprocessing
from service.errors import ImageTooLarge, InvalidImage
from service.images.decode import decode, decode_pixels, prepare
from service.images.raw import NormalisedPixels, RawPixels
from service.settings.limits import Limits

LIMITS = Limits()
WITH_CROP = Preprocessing.of(VARIANTS["dat_nano"])
WITHOUT = Preprocessing((64, 96), (64, 96))


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("preprocessing", [WITH_CROP, WITHOUT], ids=["crop", "no crop"])
@pytest.mark.parametrize("size", [None, (128, 128), (64, 96), (1, 1), (300, 40), (33, 501)])
def test_pixels_become_what_a_file_of_them_becomes(preprocessing, size):
    pixels = image(*(size or preprocessing.resize_to))
    pixels.flags.writeable = False
    room: list[np.ndarray] = []

    def empty(shape: tuple[int, ...]) -> np.ndarray:
        room.append(np.zeros(shape, np.uint8))
        return room[-1]

    ours = prepare(RawPixels(pixels), LIMITS, preprocessing, empty)
    files = prepare(png(pixels), LIMITS, preprocessing)
    np.testing.assert_array_equal(ours.pixels, files.pixels)
    assert (ours.width, ours.height, ours.pixel_map) == (
        files.width,
        files.height,
        files.pixel_map,
    )
    assert ours.pixels is room[0]
    np.testing.assert_array_equal(prepare(RawPixels(pixels), LIMITS, preprocessing).pixels,
                                  files.pixels)  # fmt: skip


def test_pixels_of_no_size_of_a_model_are_not_copied():
    pixels = image(50, 70)
    assert decode_pixels(RawPixels(pixels), LIMITS) is pixels
    np.testing.assert_array_equal(np.asarray(decode(RawPixels(pixels), LIMITS)), pixels)


def normalised(pixels: np.ndarray) -> np.ndarray:
    return ((pixels / 255 - MEAN) / STD).astype(np.float32).transpose(2, 0, 1)


def test_normalised_values_are_rounded_to_the_bytes_that_they_stand_for():
    every = np.stack([np.arange(256, dtype=np.uint8)] * 3, -1)[None].repeat(2, 0)
    rng = np.random.default_rng(0)
    for off in (0, rng.uniform(-0.49, 0.49, every.shape)):
        values = NormalisedPixels(normalised(every + off))
        np.testing.assert_array_equal(decode_pixels(values, LIMITS), every)
    beyond = decode_pixels(NormalisedPixels(normalised(every * 1.2 - 20)), LIMITS)
    np.testing.assert_array_equal(beyond, np.clip(np.rint(every * 1.2 - 20), 0, 255))
    size = Preprocessing((2, 256), (4, 512))
    prepared = prepare(NormalisedPixels(normalised(every)), LIMITS, size)
    np.testing.assert_array_equal(prepared.pixels, every)
    assert prepared.pixel_map.to_image((3.5, 1.5)).tolist() == [3.5, 1.5]


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf, 255.0, 1e38])
def test_values_that_no_pixel_has_are_refused(strange):
    values = normalised(image(4, 5))
    values[1, 2, 3] = strange
    with pytest.raises(InvalidImage, match="expected 0 to 255"):
        decode_pixels(NormalisedPixels(values), LIMITS)


def test_sizes_have_the_limits_of_all_images():
    for size in ((0, 5), (5, 0)):
        with pytest.raises(InvalidImage, match="the image has"):
            decode(RawPixels(np.zeros((*size, 3), np.uint8)), LIMITS)
    for large in (
        np.broadcast_to(np.uint8(0), (1, 70_000, 3)), np.broadcast_to(np.uint8(0), (9000, 9000, 3))
    ):  # fmt: skip
        with pytest.raises(ImageTooLarge):
            prepare(RawPixels(large), LIMITS, WITH_CROP)
    with pytest.raises(InvalidImage, match=r"has 5x4 pixels; expected .* 128x128"):
        prepare(NormalisedPixels(normalised(image(4, 5))), LIMITS, WITH_CROP)
