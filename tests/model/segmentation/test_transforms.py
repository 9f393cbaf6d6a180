import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.normalise import Normalise
from model.segmentation import SEGMENTERS
from model.segmentation.transforms import Resizing, to_model_pixels
from tests.model.segmentation.conftest import small_segmenter

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of the official configurations


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((480, 640), (512, 683)),
        ((640, 480), (683, 512)),
        ((100, 100), (512, 512)),
        ((3000, 4000), (512, 683)),
        ((100, 1000), (205, 2048)),  # more elongated than 4:1: the long side decides
        ((1000, 100), (2048, 205)),
    ],
)
def test_the_short_side_becomes_512_pixels(size, resized):
    assert Resizing(size).resized == resized


sides = st.integers(1, 9000)


@given(sides, sides)
def test_nothing_is_padded_and_the_aspect_is_kept(height, width):
    resizing = Resizing((height, width))
    new_height, new_width = resizing.resized
    assert max(new_height, new_width) <= 2048
    assert min(new_height, new_width) <= 512
    assert max(new_height, new_width) == 2048 or min(new_height, new_width) == 512
    factor = max(new_height, new_width) / max(height, width)
    assert abs(min(new_height, new_width) - factor * min(height, width)) <= 1


@given(sides, sides, st.floats(0, 1), st.floats(0, 1))
def test_points_come_back(height, width, down, across):
    resizing = Resizing((height, width))
    if not resizing.fits:
        return
    point = [across * width, down * height]
    there = resizing.to_input(point)
    np.testing.assert_allclose(resizing.to_image(there), point, rtol=1e-9, atol=1e-9)
    assert (there <= np.array(resizing.resized[::-1]) * (1 + 1e-6)).all()


def test_the_input_is_all_of_the_resized_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    resizing = Resizing(pixels.shape[:2])
    ours = to_model_pixels(pixels, resizing)
    assert ours.shape == (512, 733, 3)
    out = np.zeros_like(ours)
    assert to_model_pixels(pixels, resizing, out) is out
    assert (out == ours).all()


def test_colours_are_normalised_as_officially():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    expected = (pixels.double() - torch.tensor(MEAN)) / torch.tensor(STD)
    ours = Normalise()(pixels).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(64, 4096), (4096, 64), (10, 9000), (1, 1000)])
def test_pictures_that_leave_one_cell_are_refused_with_a_sentence(size):
    pixels = np.zeros((*size, 3), np.uint8)
    resizing = Resizing(size)
    assert not resizing.fits
    with pytest.raises(ValueError, match=r"a segmenter needs more than 32 pixels a side: crop the"):
        to_model_pixels(pixels, resizing)


@pytest.mark.parametrize("size", [(66, 4096), (4096, 66)])
def test_pictures_just_wide_enough_are_taken(size):
    resizing = Resizing(size)
    assert min(resizing.resized) == 33
    assert resizing.fits
    to_model_pixels(np.zeros((*size, 3), np.uint8), resizing)


@pytest.mark.parametrize("kind", ["semantic_fpn", "upernet"])
def test_a_side_of_33_pixels_gives_numbers(kind):
    segmenter = small_segmenter(kind)
    with torch.inference_mode():
        logits = segmenter(torch.randn(1, 3, 33, 130))
        assert logits.shape == (1, 9, 33, 7)
        assert logits.isfinite().all()
        with pytest.raises(ValueError, match="at least 33 pixels"):
            segmenter(torch.randn(1, 3, 32, 130))


def test_the_published_scale_is_the_default():
    published = [config for config in SEGMENTERS.values() if "dat_pp" in config.name]
    assert len(published) == 6
    for config in published:
        assert config.resizing((480, 640)) == Resizing((480, 640), 2048, 512)
        assert config.resizing((480, 640), 1.75) == Resizing((480, 640), 3584, 896)
