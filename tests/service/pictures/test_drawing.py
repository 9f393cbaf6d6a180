"""What is drawn lies where its coordinates say, as pixels and as SVG."""

from dataclasses import replace
from io import BytesIO
from math import pi
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.pictures import raster, vector
from service.pictures.colours import BLACK, PALETTE, WHITE, contrast
from service.pictures.compose import Layer, Query, Said, Thing, Window, compose
from service.pictures.shapes import Area, Circle, Frame, Label, Line, Outline, Scene

SVG = "{http://www.w3.org/2000/svg}"
GREY = (90, 90, 90)
PICTURES = st.tuples(st.integers(64, 500), st.integers(64, 500))  # (W, H)
QUICK = settings(max_examples=20, deadline=None)


def drawn(size, shapes, background=GREY, **more):
    photo = np.full((size[1], size[0], 3), background, np.uint8)
    return raster.draw(photo, Scene(*size, tuple(shapes), **more))


def weight(pixels, colour, background=GREY):
    """How much of each pixel `(H, W)` has a colour instead of that of the background."""
    way = np.subtract(colour, background)
    return (pixels.astype(float) - background) @ way / (way @ way)


def centre_of_mass(share):
    rows, columns = np.indices(share.shape) + 0.5
    return (columns * share).sum() / share.sum(), (rows * share).sum() / share.sum()


def svg(size, shapes, **more):
    document = vector.draw(b"a photo", Scene(*size, tuple(shapes), **more))
    return ET.fromstring(document)


@QUICK
@given(PICTURES, st.floats(0, 1), st.floats(0, 1), st.floats(1.5, 20))
def test_a_circle_lies_where_it_is_said_to(size, x, y, radius):
    width, height = size
    # All of it in the picture.
    centre = (
        radius + 2 + x * (width - 2 * radius - 4),
        radius + 2 + y * (height - 2 * radius - 4),
    )
    circle = Circle(centre, radius, WHITE)
    share = weight(drawn(size, [circle]), WHITE)
    assert centre_of_mass(share) == pytest.approx(centre, abs=0.25)
    area = pi * radius**2
    assert share.sum() == pytest.approx(area, abs=0.1 * area + 0.8 * radius + 0.5)
    (element,) = svg(size, [circle]).iter(f"{SVG}circle")
    placed = [float(element.attrib[name]) for name in ("cx", "cy", "r")]
    assert placed == pytest.approx([*centre, radius], abs=0.006)


@QUICK
@given(PICTURES, st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(1, 12))
def test_a_line_has_its_ends_and_its_width(size, ends, line_width):
    low, scale = line_width + 2, np.subtract(size, 2 * line_width + 4)
    start, end = low + np.array(ends[:2]) * scale, low + np.array(ends[2:]) * scale
    length = np.hypot(*(end - start))
    if length < 20:
        return
    line = Line(tuple(start), tuple(end), line_width, WHITE)
    share = weight(drawn(size, [line]), WHITE)
    assert centre_of_mass(share) == pytest.approx((start + end) / 2, abs=1)
    assert share.sum() == pytest.approx(length * line_width, abs=length * (1.4 + 0.1 * line_width))
    along = (end - start) / length
    rows, columns = np.nonzero(share > 0.1)
    offsets = np.stack((columns + 0.5, rows + 0.5), 1) - start
    across = np.abs(offsets @ np.array([-along[1], along[0]]))
    assert across.max() < line_width / 2 + 1.6
    assert (offsets @ along).min() > -2
    assert (offsets @ along).max() < length + 2
    (element,) = svg(size, [line]).iter(f"{SVG}path")
    assert float(element.attrib["stroke-width"]) == pytest.approx(line_width, abs=0.006)


@QUICK
@given(PICTURES, st.data())
def test_a_frame_is_a_line_around_its_box(size, data):
    width, height = size
    x1, x2 = sorted(data.draw(st.lists(st.floats(4, width - 4), min_size=2, max_size=2)))
    y1, y2 = sorted(data.draw(st.lists(st.floats(4, height - 4), min_size=2, max_size=2)))
    if x2 - x1 < 20 or y2 - y1 < 20:
        return
    frame = Frame((x1, y1, x2, y2), 3.0, WHITE)
    share = weight(drawn(size, [frame]), WHITE)
    middle = round((y1 + y2) / 2)
    (columns,) = np.nonzero(share[middle] > 0.5)
    assert columns.min() + 0.5 == pytest.approx(x1, abs=2)
    assert columns.max() + 0.5 == pytest.approx(x2, abs=2)
    (rows,) = np.nonzero(share[:, round((x1 + x2) / 2)] > 0.5)
    assert rows.min() + 0.5 == pytest.approx(y1, abs=2)
    assert rows.max() + 0.5 == pytest.approx(y2, abs=2)
    assert share[middle, round((x1 + x2) / 2)] == 0


RING = np.array([[10.0, 10], [50, 10], [50, 40], [10, 40]])
HOLE = np.array([[20.0, 20], [30, 20], [30, 30], [20, 30]])


def test_an_area_is_what_its_rings_enclose():
    area = Area((RING, HOLE), WHITE)
    share = weight(drawn((80, 60), [area]), WHITE)
    assert share[12:18, 12:48].min() == 1
    assert share[23:27, 23:27].max() == 0
    assert share[:8].max() == 0
    assert share.sum() == pytest.approx(40 * 30 - 10 * 10, rel=0.15)
    half = weight(drawn((80, 60), [Area((RING, HOLE), WHITE, 0.5)]), WHITE)
    assert half[15, 30] == pytest.approx(0.5, abs=0.01)
    (path,) = svg((80, 60), [area]).iter(f"{SVG}path")
    assert path.attrib["fill-rule"] == "evenodd"
    assert path.attrib["d"] == "M10 10L50 10L50 40L10 40ZM20 20L30 20L30 30L20 30Z"


def test_an_outline_follows_its_rings():
    share = weight(drawn((80, 60), [Outline((RING,), 3, WHITE)]), WHITE)
    assert share[9:11, 20:40].min() > 0.5
    assert share[25, 30] == 0


@QUICK
@given(PICTURES, st.floats(0, 1))
def test_opacity_is_that_of_all_shapes_together(size, opacity):
    centre = size[0] / 2, size[1] / 2
    shapes = [Circle(centre, 20, BLACK), Circle(centre, 18, WHITE)]
    share = weight(drawn(size, shapes, opacity=opacity), WHITE)
    # The black circle below does not shine through.
    assert share[size[1] // 2, size[0] // 2] == pytest.approx(opacity, abs=0.01)
    (group,) = svg(size, shapes, opacity=opacity).iter(f"{SVG}g")
    assert float(group.attrib["opacity"]) == pytest.approx(opacity, abs=0.006)


@QUICK
@given(PICTURES, st.integers(2, 20))
def test_the_plain_image_stands_beside(size, gap):
    photo = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    circle = Circle((10.0, 12.0), 5.0, WHITE)
    pixels = raster.draw(photo, Scene(*size, (circle,), gap=gap))
    assert pixels.shape == (size[1], 2 * size[0] + gap, 3)
    np.testing.assert_array_equal(pixels[:, : size[0]], photo)
    alone = raster.draw(photo, Scene(*size, (circle,)))
    np.testing.assert_array_equal(pixels[:, size[0] + gap :], alone)
    document = svg(size, [circle], gap=gap)
    (inner,) = document.findall(f"{SVG}svg")
    assert float(inner.attrib["x"]) == size[0] + gap
    assert document.attrib["viewBox"] == f"0 0 {2 * size[0] + gap} {size[1]}"
    (use,) = document.iter(f"{SVG}use")
    assert use.attrib["href"] == "#photo"


ELEMENTS = {"svg", "title", "image", "g", "circle", "path", "rect", "text", "use"}
ATTACKS = [
    "</text><script>alert(1)</script>",
    "&lt;b&gt;",
    "]]>",
    "\"'<!--",
    "a&#0;b",
    "\0\x1b\ud800",
]


@QUICK
@given(st.text() | st.sampled_from(ATTACKS))
def test_a_name_of_a_class_is_text_in_svg_and_nothing_else(name):
    said = Said(900, 900, things=(Thing(name, 0.5, 1, (300.0, 300.0, 500.0, 500.0)),))
    shapes = compose(said, (900, 900))
    document = svg((900, 900), shapes)
    assert {element.tag.removeprefix(SVG) for element in document.iter()} <= ELEMENTS
    (label,) = [shape for shape in shapes if isinstance(shape, Label)]
    (text,) = document.iter(f"{SVG}text")
    assert text.text == label.text
    for element in document.iter():
        assert not any(name.startswith("on") or name == "style" for name in element.attrib)
        href = element.attrib.get("href", "#")
        assert href.startswith(("#", "data:image/jpeg;base64,"))
    drawn((900, 900), shapes)


def layer(points, *, received=None, queries=(), groups=None):
    points = np.array(points, np.float32)
    return Layer(
        tuple(groups or range(len(points))),
        points,
        points.mean(0) + 30,
        None if received is None else np.array(received, np.float32),
        queries,
    )


def circles(shapes, colour):
    return [shape for shape in shapes if isinstance(shape, Circle) and shape.colour == colour]


@QUICK
@given(PICTURES, st.integers(30, 4000), st.integers(30, 4000), st.integers(0, 99))
def test_points_lie_at_their_place_in_the_image(size, width, height, seed):
    random = np.random.default_rng(seed)
    points = random.random((3, 5, 2)) * (width, height)
    shapes = compose(Said(width, height, (layer(points),)), size)
    for group in range(3):
        found = [shape.centre for shape in circles(shapes, PALETTE[group])]
        expected = points[group] * size / (width, height)
        np.testing.assert_allclose(sorted(found), sorted(map(tuple, expected)), atol=1e-2)


@QUICK
@given(st.lists(st.floats(0, 50), min_size=8, max_size=8))
def test_the_size_of_a_point_grows_with_its_attention(received):
    received = np.array(received).reshape(1, 8)
    points = np.arange(16.0).reshape(1, 8, 2) * 20
    shapes = compose(Said(400, 400, (layer(points, received=received),)), (400, 400))
    radii = {shape.centre: shape.radius for shape in circles(shapes, PALETTE[0])}
    by_attention = [radii[tuple(points[0, n])] for n in np.argsort(received[0], kind="stable")]
    assert by_attention == sorted(by_attention)
    if received.max() > 0:
        # As areas compare, unless a point would be too small to be seen.
        largest = by_attention[-1]
        shares = np.sort(received[0]) / received.max()
        for radius, share in zip(by_attention, shares, strict=True):
            assert radius == pytest.approx(max(largest * share**0.5, min(by_attention)), rel=1e-4)


def test_several_layers_have_a_colour_each():
    one, other = layer([[[10.0, 10]], [[20, 20]]]), layer([[[50.0, 50]], [[60, 60]]])
    shapes = compose(Said(100, 100, (one, other)), (100, 100))
    assert len(circles(shapes, PALETTE[0])) == len(circles(shapes, PALETTE[1])) == 2


def test_arrows_lead_from_the_reference_points_to_the_points():
    points = layer([[[200.0, 100.0]]])
    shapes = compose(Said(300, 300, (points,), arrows=True), (300, 300))
    line = next(shape for shape in shapes if isinstance(shape, Line) and shape.colour == PALETTE[0])
    assert line.start == pytest.approx((230, 130))
    head = next(shape for shape in shapes if isinstance(shape, Area) and shape.colour == PALETTE[0])
    (disc,) = circles(shapes, PALETTE[0])
    tip = head.rings[0][0]
    assert np.hypot(*(tip - (200, 100))) == pytest.approx(disc.radius, abs=0.01)
    # Without a way there is no arrow.
    still = Layer((0,), np.array([[[5.0, 5]]], np.float32), np.array([[5.0, 5]], np.float32))
    shapes = compose(Said(300, 300, (still,), arrows=True), (300, 300))
    assert not any(isinstance(shape, Line) for shape in shapes)


def test_lines_to_keys_are_as_thick_as_their_weights():
    keys = np.array([[[10.0, 10], [90, 10], [10, 90]]], np.float32)
    query = Query((50.0, 50.0), keys, np.array([[0.6, 0.3, 0.1]], np.float32))
    said = Said(100, 100, (layer(keys, queries=(query,)),), points=False)
    shapes = compose(said, (100, 100))
    lines = [shape for shape in shapes if isinstance(shape, Line) and shape.colour == PALETTE[0]]
    widths = {line.end: line.width for line in lines}
    assert widths[10.0, 10.0] > widths[90.0, 10.0] > widths[10.0, 90.0]
    assert all(line.start == (50, 50) for line in lines)


@pytest.mark.parametrize("size", [(200, 150), (1280, 960), (3840, 2160)])
def test_strokes_grow_with_the_picture_and_are_never_too_thin(size):
    thing = Thing("star", 0.9, 0, (10.0, 10.0, 60.0, 60.0), (RING.astype(np.int64),))
    said = Said(80, 60, (layer([[[40.0, 30]]]),), (thing,), arrows=True)
    shapes = compose(said, size)
    widths = [shape.width for shape in shapes if isinstance(shape, Line | Frame | Outline)]
    assert min(widths) >= 1
    (disc,) = circles(shapes, PALETTE[0])
    assert disc.radius >= 2
    assert max(widths) <= max(size) / 40
    assert min(widths) >= max(size) / 1500
    (label,) = [shape for shape in shapes if isinstance(shape, Label)]
    assert label.size >= max(9, max(size) / 70)


WINDOW = Window(
    (20.2, 20.7, 60.2, 60.7),
    (30.2, 30.7),
    np.array([[30.2, 30.7], [50.2, 50.7]], np.float32),
    np.array([0.9, 0.1], np.float32),
    (20.0, 20.0),
)


def test_tiles_of_a_window_have_the_area_of_their_weights():
    (outer, inner) = (
        np.ptp(area.rings[0], 0)
        for area in compose(Said(100, 100, windows=((WINDOW,),)), (300, 300))
        if isinstance(area, Area)
    )
    assert outer.prod() / inner.prod() == pytest.approx(9, rel=1e-4)
    assert (outer < 3 * 20).all()
    # What of a window lies beyond the picture is not seen, but its outline is.
    beyond = replace(WINDOW, box=(60.0, -10.0, 180.0, 40.0))
    frames = [
        shape.box
        for shape in compose(Said(100, 100, windows=((beyond,),)), (300, 300))
        if isinstance(shape, Frame)
    ]
    assert all(y1 > 0 and x2 < 300 for _, y1, x2, _ in frames)


@QUICK
@given(st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from([200, 480]), st.integers(0, 7))
def test_points_boxes_and_arrows_stand_out_from_any_photo(background, side, group):
    point = layer([[[60.3, 40.6]]] * 8)
    only = Layer((group,), point.points[:1], point.origins)
    for shown in (
        Said(100, 100, (only,)),
        Said(100, 100, (only,), points=False, arrows=True),
        Said(100, 100, things=(Thing("a", 1.0, group, (20.2, 20.7, 70.1, 80.9)),)),
        Said(100, 100, windows=((WINDOW,),)),
    ):
        shapes = [one for one in compose(shown, (side, side)) if not isinstance(one, Label)]
        pixels = drawn((side, side), shapes, background).astype(np.int64)
        packed = np.unique(pixels @ (2**16, 2**8, 1)).tolist()
        touched = [(one >> 16, one >> 8 & 255, one & 255) for one in packed]
        # The least that guidelines ask of what is no text (WCAG 2.2, 1.4.11).
        assert max(contrast(one, background) for one in touched) >= 3


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_a_file_has_the_size_and_the_colours_of_the_picture(form):
    pixels = np.full((40, 60, 3), (200, 90, 10), np.uint8)
    with Image.open(BytesIO(raster.encode(pixels, form))) as image:
        assert image.format == form.upper()
        found = np.asarray(image.convert("RGB"))
    assert found.shape == pixels.shape
    np.testing.assert_allclose(found.astype(int), pixels.astype(int), atol=6)
    if form == "png":
        np.testing.assert_array_equal(found, pixels)


def test_the_same_scene_is_the_same_file():
    said = Said(80, 60, (layer([[[40.0, 30]]]),), (Thing("a", 0.5, 3, (5.0, 5.0, 50.0, 50.0)),))
    for form in ("png", "webp"):
        files = {raster.encode(drawn((300, 200), compose(said, (300, 200))), form) for _ in "ab"}
        assert len(files) == 1
