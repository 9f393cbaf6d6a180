"""The colours and the names of regions lie where their pixels are."""

from base64 import b64decode
from io import BytesIO
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from service.pictures import raster, vector
from service.pictures.compose import Said, compose
from service.pictures.regions import NamedRegion, Regions
from service.pictures.shapes import ColourMap, Label, Scene

COLOURS = ((200, 30, 60), (10, 220, 90), (40, 80, 250))


def regions(indices, opacity=0.5):
    counts = np.bincount(indices.ravel(), minlength=len(COLOURS) + 1)[: len(COLOURS)]
    named = tuple(
        NamedRegion(f"kind {index}", index, counts[index] / indices.size)
        for index in np.argsort(-counts)
        if counts[index]
    )
    return Regions(indices, COLOURS, named, opacity)


@settings(max_examples=30, deadline=None)
@given(
    arrays.arrays(np.uint8, (7, 9), elements=st.integers(0, len(COLOURS))),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_every_pixel_has_the_colour_of_its_region(indices, opacity):
    photo = np.random.default_rng(0).integers(0, 256, (14, 18, 3), np.uint8)
    shape = regions(indices, opacity).colour_map((18, 14))
    drawn = raster.draw(photo, Scene(18, 14, (shape,)))
    large = indices.repeat(2, 0).repeat(2, 1)
    with_black = np.array([*COLOURS, (0, 0, 0)])
    mixed = np.floor(photo * (1 - opacity) + with_black[large] * opacity)
    expected = np.where((large == len(COLOURS))[..., None], photo, mixed)
    np.testing.assert_array_equal(drawn, expected)


def test_an_svg_holds_the_same_colours():
    indices = np.array([[0, 1], [2, 3]], np.uint8)
    shape = ColourMap(indices, COLOURS, 0.3)
    document = ET.fromstring(vector.draw(b"a photo", Scene(2, 2, (shape,))))
    _, image = document.iter("{http://www.w3.org/2000/svg}image")
    assert image.attrib["opacity"] == "0.3"
    _, data = image.attrib["href"].split(",")
    with Image.open(BytesIO(b64decode(data))) as png:
        pixels = np.asarray(png.convert("RGBA"))
    assert pixels[..., 3].ravel().tolist() == [255, 255, 255, 0]
    assert pixels[..., :3].reshape(4, 3)[:3].tolist() == [list(colour) for colour in COLOURS]


@pytest.mark.parametrize("size", [(640, 480), (200, 150), (3000, 2250)])
def test_names_lie_on_their_regions(size):
    """Also where the middle of the box around a region is another one."""
    indices = np.zeros((300, 400), np.uint8)
    indices[60:240, 60:340] = 1
    indices[20:40, 20:40] = 2
    said = Said(400, 300, regions=regions(indices))
    labels = [shape for shape in compose(said, size) if isinstance(shape, Label)]
    large = raster.draw(
        np.zeros((size[1], size[0], 3), np.uint8),
        Scene(*size, (regions(indices, 1.0).colour_map(size),)),
    )
    names = {label.text.split(" ")[1] for label in labels}
    assert {"0", "1"} <= names
    for label in labels:
        kind = int(label.text.split(" ")[1])
        x, y = label.left + label.width / 2, label.top + label.height / 2
        assert tuple(large[int(y), int(x)]) == COLOURS[kind] == label.paper
    has_shares = [("%" in label.text) for label in labels]
    assert set(has_shares) == {max(size) >= 300}


def test_a_region_without_room_has_no_name():
    indices = np.zeros((300, 400), np.uint8)
    indices[:, ::40] = 1  # thin lines
    labels = [
        shape
        for shape in compose(Said(400, 300, regions=regions(indices)), (400, 300))
        if isinstance(shape, Label)
    ]
    assert [label.text for label in labels] == ["kind 0 98%"]
