import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.detection import DETECTORS
from model.detection.normalise import MEAN, STD, Normalise
from model.detection.transforms import Resizing, to_model_pixels
from model.resizing import resize_bilinear

few, sides = st.integers(1, 12), st.integers(1, 40)


@settings(deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**32 - 1))
def test_resizing_is_bilinear_up_to_rounding(height, width, new_height, new_width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    channels_first = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(
        channels_first, (new_height, new_width), mode="bilinear"
    )
    resized = resize_bilinear(pixels, (new_height, new_width))
    assert resized.dtype == np.uint8
    difference = np.abs(resized - expected[0].permute(1, 2, 0).numpy())
    assert difference.max() <= 1.01


def test_an_exact_half_is_the_mean_of_four_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    mean = pixels.reshape(4, 2, 3, 2, 3).mean((1, 3))
    assert (resize_bilinear(pixels, (4, 3)) == np.floor(mean + 0.5)).all()


@settings(deadline=None, max_examples=60)
@given(few, few, few, few, st.integers(0, 2**32 - 1))
def test_resizing_has_the_arithmetic_of_the_official_pipeline(
    height, width, new_height, new_width, seed
):
    """Which OpenCV might change; the sides at which it halves have a test of their own."""
    assume((height, width) != (2 * new_height, 2 * new_width))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    resized = resize_bilinear(pixels, (new_height, new_width))
    for row in range(new_height):
        (top, bottom), (upper, lower) = taps(row, height, new_height)
        for column in range(new_width):
            (left, right), weights = taps(column, width, new_width)
            if left == right:  # beyond the first or the last column there is one weight
                weights = (2048, 0)
            lines = pixels[[top, bottom]].astype(int)
            above, below = lines[:, left] * weights[0] + lines[:, right] * weights[1] >> 4
            expected = (above * upper >> 16) + (below * lower >> 16) + 2 >> 2
            assert resized[row, column].tolist() == expected.tolist()


def taps(index, size, new_size):
    """Two pixels of an axis around the new pixel, and their weights of 11 bits."""
    position = np.float32((index + 0.5) * (1 / (new_size / size)) - 0.5)
    first = int(np.floor(position))
    fraction = position - np.float32(first)
    weights = (round(float(1 - fraction) * 2048), round(float(fraction) * 2048))
    return tuple(min(max(pixel, 0), size - 1) for pixel in (first, first + 1)), weights


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((480, 640), (800, 1067), (800, 1088)),
        ((640, 480), (1067, 800), (1088, 800)),
        ((100, 1000), (133, 1333), (160, 1344)),
        ((4000, 3000), (1067, 800), (1088, 800)),
    ],
)
def test_images_fit_the_largest_input_in_either_orientation(size, resized, padded):
    resizing = Resizing(size)
    assert (resizing.resized, resizing.padded) == (resized, padded)


def test_points_go_back_by_the_rounded_sizes():
    resizing = Resizing((427, 640))
    height, width = resizing.resized
    points = resizing.to_image([[0, 0], [width, height]])
    np.testing.assert_allclose(points, [[0, 0], [640, 427]], rtol=1e-6)


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(2, 42), st.data())
def test_a_letterbox_keeps_the_aspect_and_fills_one_square(height, width, cells, data):
    side = 32 * cells
    resizing = Resizing.letterbox((height, width), side)
    assert resizing.padded == (side, side)
    assert max(resizing.resized) == side
    shorter = side * min(height, width) / max(height, width)
    assert abs(min(resizing.resized) - shorter) <= 0.5 + 1e-9
    assert resizing.fits == (min(resizing.resized) > 0)
    if not resizing.fits:
        return
    x, y = data.draw(st.tuples(st.floats(0, width), st.floats(0, height)))
    scale_x, scale_y = resizing.scale_xy
    new_height, new_width = resizing.resized
    assert x * scale_x <= new_width * (1 + 1e-6)
    assert y * scale_y <= new_height * (1 + 1e-6)
    back = resizing.to_image([x * scale_x, y * scale_y])
    np.testing.assert_allclose(back, [x, y], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "pixels", [np.zeros((40, 50), np.uint8), np.zeros((40, 50, 3)), np.zeros((40, 50, 4), np.uint8)]
)
def test_what_is_no_picture_is_refused(pixels):
    with pytest.raises(ValueError, match=r"expected an RGB image \(H, W, 3\), NumPy's uint8; got"):
        to_model_pixels(pixels, Resizing((40, 50)))


def test_the_letterbox_of_a_model_has_about_as_many_pixels_as_its_largest_input():
    for config in DETECTORS.values():
        assert config.letterbox_size == (256 if "nano" in config.name else 1024)
        assert 0.8 <= config.letterbox_size**2 / math.prod(config.scale) <= 1.25


@pytest.mark.parametrize(
    ("resizing", "resized", "padded"),
    [
        (Resizing((40, 50), 100, 70), (70, 88), (96, 96)),
        (Resizing.letterbox((40, 50), 128), (102, 128), (128, 128)),
    ],
)
def test_padding_is_the_mean_colour(resizing, resized, padded):
    pixels = to_model_pixels(np.full((40, 50, 3), 7, np.uint8), resizing)
    assert (resizing.resized, pixels.shape) == (resized, (*padded, 3))
    images = Normalise()(torch.from_numpy(pixels)[None], torch.tensor([resized]))
    height, width = resized
    expected = (torch.full((3,), 7.0) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(images[0, :, :height, :width].mean((1, 2)), expected)
    assert (images[:, :, height:] == 0).all()
    assert (images[:, :, :, width:] == 0).all()
