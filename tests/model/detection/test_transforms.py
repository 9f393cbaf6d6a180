import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection.transforms import (
    MEAN,
    STD,
    Normalise,
    Resizing,
    resize_bilinear,
    to_model_pixels,
)

sides = st.integers(1, 40)


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


def test_beyond_the_first_and_the_last_row_both_products_are_cut_off():
    """A peculiarity of OpenCV's fixed-point arithmetic, which columns do not have."""
    pixels = np.full((2, 2, 1), 31, np.uint8)
    enlarged = resize_bilinear(pixels, (8, 8))[..., 0]
    assert enlarged[1:-1].tolist() == [[31] * 8] * 6
    assert set(enlarged[[0, -1]].flat) <= {30, 31}


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


def test_padding_is_the_mean_colour():
    pixels = to_model_pixels(np.full((40, 50, 3), 7, np.uint8), Resizing((40, 50), 100, 70))
    assert pixels.shape == (96, 96, 3)
    images = Normalise()(torch.from_numpy(pixels)[None], torch.tensor([[70, 88]]))
    expected = (torch.full((3,), 7.0) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(images[0, :, :70, :88].mean((1, 2)), expected)
    assert (images[:, :, 70:] == 0).all()
    assert (images[:, :, :, 88:] == 0).all()
