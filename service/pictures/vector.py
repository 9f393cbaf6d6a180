"""Draws a scene as SVG: one file that holds its photo, without scripts, styles or links.

Colours and sizes are attributes, so that a page with a strict Content-Security-Policy shows it.
What comes from a checkpoint, as the names of classes do, is escaped.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from service.pictures.colours import BLACK, hexadecimal
from service.pictures.indexed import indexed_png
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

_FONT = "Helvetica, Arial, sans-serif"


def draw(jpeg: bytes, scene: Scene) -> bytes:
    """A scene as an SVG file.

    Args:
        jpeg: the photo, of the size of the scene.
        scene: what is drawn over it.
    """
    return "".join(_document(jpeg, scene)).encode()


def _document(jpeg: bytes, scene: Scene) -> Iterator[str]:
    width, height = scene.width, scene.height
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{scene.full_width}" height="{height}" '
        f'viewBox="0 0 {scene.full_width} {height}" role="img">'
        "<title>Where the model looked</title>"
    )
    if scene.gap is not None:
        yield f'<rect width="{scene.full_width}" height="{height}" fill="#ffffff"/>'
    yield (
        f'<image id="photo" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{b64encode(jpeg).decode()}"/>'
    )
    if scene.gap is not None:
        yield f'<use href="#photo" x="{scene.left}"/>'
    # What lies beyond the edges of an inner picture is cut off.
    yield (
        f'<svg x="{scene.left}" width="{width}" height="{height}" overflow="hidden">'
        f'<g opacity="{_number(scene.opacity)}">'
    )
    for shape in scene.shapes:
        yield _element(shape)
    yield "</g></svg></svg>\n"


def _element(shape: Shape) -> str:  # noqa: PLR0911
    match shape:
        case Circle(centre=(x, y)):
            return (
                f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(shape.radius)}" '
                f'fill="{hexadecimal(shape.colour)}"/>'
            )
        case Line(start=start, end=end):
            path = f"M{_pair(start)}L{_pair(end)}"
            return _stroked(path, shape)
        case Frame(box=(x1, y1, x2, y2)):
            return _stroked(f"M{_pair((x1, y1))}H{_number(x2)}V{_number(y2)}H{_number(x1)}Z", shape)
        case Outline():
            return _stroked(_closed(shape.rings), shape, ' stroke-linejoin="round"')
        case Area():
            opacity = "" if shape.opacity == 1 else f' fill-opacity="{_number(shape.opacity)}"'
            return (
                f'<path d="{_closed(shape.rings)}" fill="{hexadecimal(shape.colour)}" '
                f'fill-rule="evenodd"{opacity}/>'
            )
        case Label():
            return _label(shape)
        case ColourMap():
            return _colour_map(shape)


def _stroked(path: str, shape: Line | Frame | Outline, more: str = "") -> str:
    return (
        f'<path d="{path}" fill="none" stroke="{hexadecimal(shape.colour)}" '
        f'stroke-width="{_number(shape.width)}"{more}/>'
    )


def _label(label: Label) -> str:
    # The viewer's font has other widths: the text is told to be as wide as on its plate.
    return (
        f'<rect x="{_number(label.left + 0.5)}" y="{_number(label.top + 0.5)}" '
        f'width="{_number(label.width - 1)}" height="{_number(label.height - 1)}" '
        f'fill="{hexadecimal(label.paper)}" stroke="{hexadecimal(BLACK)}"/>'
        f'<text x="{_number(label.left + label.padding)}" '
        f'y="{_number(label.top + label.baseline)}" font-family="{_FONT}" '
        f'font-size="{label.size}" fill="{hexadecimal(label.ink)}" '
        f'textLength="{_number(label.width - 2 * label.padding)}" '
        f'lengthAdjust="spacingAndGlyphs">{escape(label.text)}</text>'
    )


def _colour_map(colour_map: ColourMap) -> str:
    height, width = colour_map.indices.shape
    png = b64encode(indexed_png(colour_map.indices, colour_map.colours)).decode()
    return (
        f'<image width="{width}" height="{height}" opacity="{_number(colour_map.opacity)}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{png}"/>'
    )


def _closed(rings: Sequence[Ring]) -> str:
    return "".join(f"M{'L'.join(_pair((x, y)) for x, y in ring.tolist())}Z" for ring in rings)


def _pair(point: Sequence[float]) -> str:
    return f"{_number(point[0])} {_number(point[1])}"


def _number(value: float) -> str:
    """A number with as many digits as can be seen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"
