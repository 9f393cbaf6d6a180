"""Draws a scene as pixels: shapes with OpenCV, text with Pillow.

OpenCV takes positions in fractions of a pixel and smooths edges where it draws, so nothing has to
be drawn larger and reduced. Its smooth outline adds half a pixel on each side, which is taken off
before.
"""

from math import ceil, floor, hypot
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.pictures.colours import BLACK, WHITE
from service.pictures.lettering import font
from service.pictures.shapes import (
    Area,
    Circle,
    ColourMap,
    Frame,
    Label,
    Line,
    Outline,
    Ring,
    Scene,
    Shape,
)

Pixels = NDArray[np.uint8]

_BITS = 6  # of the fraction of a position
_GROWN = 0.5  # of each side of a smooth shape, pixels
_GROWN_LINE = 0.7  # likewise, of a smooth straight line
_THINNEST = 0.05  # of what is filled inside of an outline, pixels
_FARTHEST = 2.0**15  # a side of a picture is shorter, pixels
_PLATE_EDGE = 1  # pixels
_ROWS = 128  # that are coloured at a time
# Drawn shapes have sharp edges, which low qualities blur.
_FORMS = {
    "png": (".png", cv2.IMWRITE_PNG_COMPRESSION, 1),
    "webp": (".webp", cv2.IMWRITE_WEBP_QUALITY, 90),
    "jpeg": (".jpg", cv2.IMWRITE_JPEG_QUALITY, 90),
}


def draw(photo: Pixels, scene: Scene) -> Pixels:
    """A scene as RGB bytes `(H, W, 3)`.

    Args:
        photo: `(scene.height, scene.width, 3)`, stays as it is.
        scene: what is drawn over it.
    """
    canvas = photo.copy()
    for shape in scene.shapes:
        _draw(canvas, shape)
    if scene.opacity < 1:
        cv2.addWeighted(canvas, scene.opacity, photo, 1 - scene.opacity, 0, dst=canvas)
    if scene.gap is None:
        return canvas
    gap = np.full((scene.height, scene.gap, 3), WHITE, np.uint8)
    return np.concatenate((photo, gap, canvas), 1)


def encode(pixels: Pixels, form: Literal["png", "webp", "jpeg"]) -> bytes:
    """RGB bytes `(H, W, 3)` as a file."""
    suffix, option, value = _FORMS[form]
    encoded, file = cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [option, value])
    assert encoded, "there is no picture that cannot be encoded"
    return file.tobytes()


def _draw(canvas: Pixels, shape: Shape) -> None:
    match shape:
        case Circle():
            _circle(canvas, shape)
        case Line():
            _line(canvas, shape)
        case Frame():
            _frame(canvas, shape)
        case Outline():
            thickness = max(1, round(shape.width - 2 * _GROWN))
            for ring in shape.rings:
                points = [_fixed(ring)]
                cv2.polylines(canvas, points, True, shape.colour, thickness, cv2.LINE_AA, _BITS)
        case Area():
            _area(canvas, shape)
        case Label():
            _label(canvas, shape)
        case ColourMap():
            _colour_map(canvas, shape)


def _circle(canvas: Pixels, circle: Circle) -> None:
    (x, y), radius = circle.centre, circle.radius
    height, width = canvas.shape[:2]
    reach = radius + 1
    if not (-reach < x < width + reach and -reach < y < height + reach):
        return
    ((centre_x, centre_y),) = _fixed(np.array([[x, y]])).tolist()
    inner = max(_THINNEST, radius - _GROWN)
    size = round(inner * 2**_BITS)
    cv2.circle(canvas, (centre_x, centre_y), size, circle.colour, cv2.FILLED, cv2.LINE_AA, _BITS)


def _line(canvas: Pixels, line: Line) -> None:
    (x1, y1), (x2, y2) = line.start, line.end
    length = hypot(x2 - x1, y2 - y1)
    if length == 0:
        return
    half = max(_THINNEST, line.width / 2 - _GROWN_LINE)
    across = np.array([-(y2 - y1), x2 - x1]) * (half / length)
    ends = np.array([line.start, line.end])
    corners = np.concatenate((ends + across, (ends - across)[::-1]))
    cv2.fillConvexPoly(canvas, _fixed(corners), line.colour, cv2.LINE_AA, _BITS)


def _frame(canvas: Pixels, frame: Frame) -> None:
    x1, y1, x2, y2 = frame.box
    half = frame.width / 2 - _GROWN
    for start, end in (
        ((x1 - half, y1), (x2 + half, y1)),
        ((x1 - half, y2), (x2 + half, y2)),
        ((x1, y1 - half), (x1, y2 + half)),
        ((x2, y1 - half), (x2, y2 + half)),
    ):
        _line(canvas, Line(start, end, frame.width, frame.colour))


def _area(canvas: Pixels, area: Area) -> None:
    """Fill on a copy of the part of the canvas that the rings reach, and mix it in."""
    if area.opacity == 1:
        rings = [_fixed(ring) for ring in area.rings]
        cv2.fillPoly(canvas, rings, area.colour, cv2.LINE_AA, _BITS)
        return
    corners = np.concatenate(area.rings)
    height, width = canvas.shape[:2]
    left, top = (max(0, floor(side) - 1) for side in corners.min(0).tolist())
    right, bottom = (ceil(side) + 2 for side in corners.max(0).tolist())
    right, bottom = min(width, right), min(height, bottom)
    if left >= right or top >= bottom:
        return
    part = canvas[top:bottom, left:right]
    filled = part.copy()
    rings = [_fixed(ring - (left, top)) for ring in area.rings]
    cv2.fillPoly(filled, rings, area.colour, cv2.LINE_AA, _BITS)
    part[...] = cv2.addWeighted(filled, area.opacity, part, 1 - area.opacity, 0)


def _label(canvas: Pixels, label: Label) -> None:
    # A plate lies within the picture, and its edges are whole pixels.
    left, top = round(label.left), round(label.top)
    width, height = round(label.width), round(label.height)
    plate = Image.new("RGB", (width, height), label.paper)
    pen = ImageDraw.Draw(plate)
    at = label.padding, label.baseline
    pen.text(at, label.text, label.ink, font(label.size), anchor="ls")
    pen.rectangle((0, 0, width - 1, height - 1), outline=BLACK, width=_PLATE_EDGE)
    canvas[top : top + height, left : left + width] = np.asarray(plate)


def _colour_map(canvas: Pixels, colour_map: ColourMap) -> None:
    """Mix colours in as mmsegmentation does, rounding down."""
    opacity = colour_map.opacity
    colours = np.array((*colour_map.colours, BLACK)) * opacity
    left = np.full((len(colours), 1), 1 - opacity)
    left[-1] = 1
    # In parts, since numbers with fractions take eight times the memory.
    for top in range(0, len(canvas), _ROWS):
        rows = slice(top, top + _ROWS)
        indices = colour_map.indices[rows]
        canvas[rows] = canvas[rows] * left[indices] + colours[indices]


def _fixed(points_xy: Ring) -> NDArray[np.int32]:
    """Positions in whole parts of a pixel; OpenCV counts from the centre of the first pixel."""
    near = (points_xy - 0.5).clip(-_FARTHEST, _FARTHEST)
    fixed: NDArray[np.int32] = (near * 2**_BITS).round().astype(np.int32)
    return fixed
