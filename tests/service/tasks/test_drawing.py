"""From an upload and an answer to a picture: what lies where, how large, and what is refused."""

from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from model import VARIANTS
from model.detection import DETECTORS
from model.detection.transforms import Resizing
from model.transforms import Preprocessing
from service.errors import InvalidOption
from service.images.decode import decode, decode_at
from service.pictures.colours import PALETTE
from service.pictures.compose import Thing
from service.settings.limits import Limits
from service.tasks.drawing import DEFAULT_LEAST, DEFAULT_MOST, Drawing, draw
from service.tasks.points import LayerPoints, explained, point_layers

SVG = "{http://www.w3.org/2000/svg}"
LIMITS = Limits()
BACKGROUND, BLOB = (60, 60, 60), (250, 40, 200)  # a colour that no shape has
# How a stored image is turned to be upright, by its EXIF orientation, undone.
STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


def stored(upright, orientation, form="PNG"):
    """The file of an image that is upright once its orientation is applied."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    STORED[orientation](upright).save(file, form, exif=exif)
    return file.getvalue()


def with_blob(size, at, radius):
    """An image of `(W, H)` pixels with a disc, the middle of which is a point."""
    columns, rows = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    inside = (columns - at[0]) ** 2 + (rows - at[1]) ** 2 <= radius**2
    pixels = np.where(inside[..., None], BLOB, BACKGROUND).astype(np.uint8)
    return Image.fromarray(pixels)


def middle(pixels, colour, background):
    way = np.subtract(colour, background)
    share = ((pixels.astype(float) - background) @ way / (way @ way)).clip(0, 1)
    share[share < 0.5] = 0
    rows, columns = np.indices(share.shape) + 0.5
    return np.array([(columns * share).sum(), (rows * share).sum()]) / share.sum()


@st.composite
def looks(draw):
    """An image, how a model sees it, and a point of the image that lies in what it sees."""
    width, height = draw(st.integers(120, 900)), draw(st.integers(120, 900))
    kind = draw(st.sampled_from(["crop", "letterbox", "official"]))
    x, y = draw(st.floats(0.2, 0.8)) * width, draw(st.floats(0.2, 0.8)) * height
    if kind == "crop":
        config = VARIANTS["dat_nano"]
        pixel_map = Preprocessing.of(config).pixel_map(width, height)
        # The image is squeezed to 146x146, and its centre of 128x128 cut out.
        return (
            config,
            (128, 128),
            pixel_map,
            (width, height),
            (x, y),
            (
                x * 146 / width - 9,
                y * 146 / height - 9,
            ),
        )
    detector = DETECTORS["mask_rcnn_dat_nano"]
    if kind == "letterbox":
        resizing = Resizing.letterbox((height, width), 256)
    else:
        resizing = detector.resizing((height, width))
    assume(resizing.fits)
    resized_height, resized_width = resizing.resized
    seen = x * resized_width / width, y * resized_height / height
    return detector.backbone, resizing.padded, resizing, (width, height), (x, y), seen


def answer_at(look):
    """What a model answers whose points all lie at the place that it sees, in its coordinates."""
    config, input_size, pixel_map, (width, height), _, seen = look
    locations = []
    for layer in point_layers(config, input_size):
        cells = (np.array(seen) - layer.first_cell) / layer.cell_stride
        normalised = 2 * cells / np.subtract(layer.map_size, 1) - 1
        shape = (2, *layer.reference_points.shape)
        locations.append(np.broadcast_to(normalised[::-1].astype(np.float32), shape))
    points = explained(config, input_size, locations, pixel_map)
    return SimpleNamespace(width=width, height=height, points=points, attention=None)


@settings(max_examples=25, deadline=None)
@given(looks(), st.integers(1, 8), st.sampled_from([None, 200, 333, 640, 1000]))
def test_a_point_is_drawn_over_what_it_was_in_the_image(look, orientation, size):
    _, _, _, image_size, at, _ = look
    upload = stored(with_blob(image_size, at, 0.1 * min(image_size)), orientation)
    answer = answer_at(look)
    last = (answer.points[-1].stage, answer.points[-1].block)
    drawing = Drawing(show=("points",), layers=(last,), groups=(0,), size=size, layout="beside")
    drawn = draw(upload, LIMITS, drawing, answer, ())
    with Image.open(BytesIO(drawn.data)) as file:
        picture = np.asarray(file)
    width, height = drawing.photo_size(*image_size)
    assert picture.shape == (height, drawn.width, 3) == (drawn.height, drawn.width, 3)
    blob = middle(picture[:, :width], BLOB, BACKGROUND)
    right = picture[:, -width:].astype(int)
    disc = np.abs(right - PALETTE[0]).sum(2) < 12
    rows, columns = np.nonzero(disc)
    found = np.array([columns.mean(), rows.mean()]) + 0.5
    np.testing.assert_allclose(found, blob, atol=1.0)
    np.testing.assert_allclose(found, np.multiply(at, (width, height)) / image_size, atol=1.0)
    # And the same in SVG.
    svg = draw(upload, LIMITS, replace(drawing, form="svg"), answer, ())
    document = ET.fromstring(svg.data)
    (inner,) = document.findall(f"{SVG}svg")
    colour = "#e69f00"
    placed = [
        [float(one.attrib["cx"]), float(one.attrib["cy"])]
        for one in inner.iter(f"{SVG}circle")
        if one.attrib["fill"] == colour
    ]
    assert placed
    np.testing.assert_allclose(placed, [found] * len(placed), atol=0.8)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 8),
    st.sampled_from(["PNG", "JPEG"]),
    st.tuples(st.integers(30, 900), st.integers(30, 900)),
    st.tuples(st.integers(20, 500), st.integers(20, 500)),
)
def test_an_image_is_resized_as_a_whole_however_it_is_stored(orientation, form, image_size, size):
    ramp = np.linspace(0, 200, image_size[0])[None] + np.linspace(0, 55, image_size[1])[:, None]
    upright = Image.fromarray(np.repeat(ramp[..., None], 3, 2).astype(np.uint8))
    upload = stored(upright, orientation, form)
    expected = decode(upload, LIMITS).resize(size, Image.Resampling.LANCZOS)
    resized = decode_at(upload, LIMITS, size)
    assert resized.size == size
    difference = np.abs(np.asarray(resized).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 1.5


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.none() | st.integers(32, 8000))
def test_the_larger_side_is_as_asked_and_the_other_follows(width, height, size):
    drawing = Drawing(show=(), size=size)
    wide, high = drawing.photo_size(width, height)
    assert max(wide, high) == (size or min(DEFAULT_MOST, max(DEFAULT_LEAST, width, height)))
    assert min(wide, high) >= 1
    if min(wide, high) > 1:
        assert wide * height == pytest.approx(high * width, rel=0.6 / (min(wide, high) - 0.6))


@given(
    st.integers(20, 5000),
    st.integers(20, 5000),
    st.none() | st.integers(32, 8000),
    st.sampled_from(["alone", "beside"]),
)
def test_what_drawing_takes_is_counted_before_its_size_is_known(width, height, size, layout):
    drawing = Drawing(show=(), size=size, layout=layout)
    wide, high = drawing.photo_size(width, height)
    pictures = 2 if layout == "beside" else 1
    counted = drawing.decoding_pixels(width * height, LIMITS)
    drawn = min(pictures * wide * high, LIMITS.max_picture_pixels)
    # Rounding of sides to whole pixels is not counted.
    assert counted >= width * height + 4 * drawn * 0.97
    assert counted <= width * height + 4 * LIMITS.max_picture_pixels


def test_a_picture_that_would_be_too_large_is_refused_with_a_sentence():
    upload = stored(with_blob((300, 200), (100, 100), 20), 1)
    answer = SimpleNamespace(width=300, height=200, points=None, attention=None)
    limits = Limits(max_picture_pixels=100_000)
    drawing = Drawing(show=("boxes",), size=500)
    sentence = "would have 500x333 pixels; the limit is 100000 pixels in all, so ask for a smaller"
    with pytest.raises(InvalidOption, match=sentence):
        draw(upload, limits, drawing, answer, ())
    draw(upload, limits, replace(drawing, size=300), answer, ())
    with pytest.raises(InvalidOption, match="would have 603x200 pixels"):
        draw(upload, limits, replace(drawing, size=300, layout="beside"), answer, ())


def test_boxes_and_masks_lie_over_their_objects():
    upload = stored(with_blob((400, 300), (250, 120), 40), 6)
    answer = SimpleNamespace(width=400, height=300, points=None, attention=None)
    ring = np.array([[210, 80], [290, 80], [290, 160], [210, 160]])
    thing = Thing("disc", 0.87, 0, (210.0, 80.0, 290.0, 160.0), (ring,))

    def shown(*show, **more):
        drawing = Drawing(show=show, size=800, **more)
        things = [thing if "masks" in show else replace(thing, rings=())]
        with Image.open(BytesIO(draw(upload, LIMITS, drawing, answer, things).data)) as file:
            return np.asarray(file).astype(int)

    plain, boxes, masks = shown("boxes", opacity=0.0), shown("boxes"), shown("masks")
    rows, columns = np.nonzero(np.abs(boxes - plain).sum(2))
    assert columns.min() == pytest.approx(420, abs=8)
    assert columns.max() == pytest.approx(580, abs=8)
    assert rows.max() == pytest.approx(320, abs=8)
    rows, columns = np.nonzero(np.abs(masks - plain).sum(2))
    assert (columns.min(), columns.max()) == pytest.approx((420, 580), abs=6)
    assert (rows.min(), rows.max()) == pytest.approx((160, 320), abs=6)
    assert np.abs(masks - plain)[240, 500].sum() > 30


@pytest.mark.parametrize("form", ["png", "webp", "svg"])
def test_every_form_is_a_file_of_its_kind(form):
    upload = stored(with_blob((300, 200), (100, 100), 20), 1)
    answer = SimpleNamespace(width=300, height=200, points=None, attention=None)
    drawn = draw(upload, LIMITS, Drawing(show=("boxes",), form=form, size=300), answer, ())
    assert (drawn.width, drawn.height) == (300, 200)
    if form == "svg":
        document = ET.fromstring(drawn.data)
        assert (document.attrib["width"], document.attrib["height"]) == ("300", "200")
        (image,) = document.iter(f"{SVG}image")
        assert image.attrib["href"].startswith("data:image/jpeg;base64,/9j/")
        return
    with Image.open(BytesIO(drawn.data)) as file:
        assert (file.format, file.size) == (form.upper(), (300, 200))


def test_more_points_than_can_be_seen_are_refused_with_a_sentence():
    upload = stored(with_blob((300, 200), (100, 100), 20), 1)
    crowd = LayerPoints(
        3, 1, np.zeros((8, 60, 60, 2), np.float32), np.zeros((60, 60, 2), np.float32)
    )
    answer = SimpleNamespace(width=300, height=200, points=(crowd,), attention=None)
    drawing = Drawing(show=("points",), layers=((3, 1),))
    with pytest.raises(
        InvalidOption, match="have 28800 points; at most 20000 are drawn, so choose"
    ):
        draw(upload, LIMITS, drawing, answer, ())
    draw(upload, LIMITS, replace(drawing, groups=(0, 1)), answer, ())
