import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from service.tasks.masks import Mask, png, polygons, run_lengths


@st.composite
def masks(draw):
    H, W = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    top, left = draw(st.integers(0, H)), draw(st.integers(0, W))
    shape = draw(st.tuples(st.integers(0, H - top), st.integers(0, W - left)))
    pixels = draw(arrays.arrays(bool, shape, elements=st.booleans()))
    return Mask(top, left, pixels, (H, W))


def whole(mask):
    image = np.zeros(mask.image_size, bool)
    h, w = mask.pixels.shape
    image[mask.top : mask.top + h, mask.left : mask.left + w] = mask.pixels
    return image


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools under NumPy 2
@given(masks())
def test_run_lengths_are_those_of_pycocotools(mask):
    counts = run_lengths(mask)
    assert coco.encode(np.asfortranarray(whole(mask).astype(np.uint8)))["counts"].decode() == counts
    H, W = mask.image_size
    assert (coco.decode({"size": [H, W], "counts": counts}) == whole(mask)).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 70_000), (2000, 3000)])
def test_long_runs(size):
    for pixels in (np.zeros(size, bool), np.ones(size, bool)):
        mask = Mask(0, 0, pixels, size)
        expected = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
        assert run_lengths(mask) == expected


def filled(rings, size):
    """The even-odd rule: every vertical edge turns over all pixels to its right."""
    image = np.zeros(size, bool)
    for ring in rings:
        for (x, y), (next_x, next_y) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            assert (x == next_x) != (y == next_y)
            if x == next_x:
                image[min(y, next_y) : max(y, next_y), x:] ^= True
    return image


@given(masks())
def test_polygons_filled_are_the_mask(mask):
    assert (filled(polygons(mask), mask.image_size) == whole(mask)).all()


def test_polygons_separate_pixels_that_touch_at_a_corner():
    for pixels in (np.eye(3, dtype=bool), np.eye(3, dtype=bool)[::-1]):
        assert [len(ring) for ring in polygons(Mask(5, 7, pixels, (20, 20)))] == [4, 4, 4]


def test_a_hole_is_a_ring():
    pixels = np.ones((3, 3), bool)
    pixels[1, 1] = False
    outer, hole = polygons(Mask(0, 10, pixels, (3, 13)))
    assert outer.tolist() == [[10, 0], [13, 0], [13, 3], [10, 3]]
    assert sorted(hole.tolist()) == [[11, 1], [11, 2], [12, 1], [12, 2]]


@given(masks().filter(lambda mask: mask.pixels.size))
def test_a_png_is_the_part(mask):
    with Image.open(io.BytesIO(png(mask))) as image:
        assert image.mode == "1"
        assert (np.asarray(image) == mask.pixels).all()
