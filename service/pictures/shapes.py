"""What a picture consists of: a photo, and plain shapes over it, the first at the bottom.

Positions are `(x, y)` in pixels of the picture from the top-left corner of its top-left pixel, so
that the centre of a pixel is at +0.5. Every way of drawing draws these shapes and knows no others.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.pictures.colours import Colour

Point = tuple[float, float]
Ring = NDArray[np.float64]  # `(n, 2)`


@dataclass(frozen=True)
class Circle:
    """A filled circle."""

    centre: Point
    radius: float
    colour: Colour


@dataclass(frozen=True)
class Line:
    """A straight line whose ends are cut off square."""

    start: Point
    end: Point
    width: float
    colour: Colour


@dataclass(frozen=True)
class Frame:
    """The outline of a rectangle `(x1, y1, x2, y2)`, which is the middle of the line."""

    box: tuple[float, float, float, float]
    width: float
    colour: Colour


@dataclass(frozen=True)
class Outline:
    """The outlines of closed rings."""

    rings: tuple[Ring, ...]
    width: float
    colour: Colour


@dataclass(frozen=True)
class Area:
    """What closed rings enclose by the even-odd rule.

    Attributes:
        rings: of the area.
        colour: of its inside.
        opacity: from 0 to 1.
    """

    rings: tuple[Ring, ...]
    colour: Colour
    opacity: float = 1.0


@dataclass(frozen=True)
class Label:
    """A line of text on a plate.

    Attributes:
        left: of the plate.
        top: of the plate.
        width: of the plate; the text keeps `padding` from its edges.
        height: of the plate.
        padding: between the text and the edges.
        text: printable characters alone.
        size: of the font.
        baseline: of the text, from the top of the plate.
        paper: colour of the plate.
        ink: colour of the text.
    """

    left: float
    top: float
    width: float
    height: float
    padding: float
    text: str
    size: int
    baseline: float
    paper: Colour
    ink: Colour


@dataclass(frozen=True)
class ColourMap:
    """A colour over each pixel of the photo.

    Attributes:
        indices: `(H, W)`, of the colour of each pixel; the one behind the last is no colour.
        colours: at most `MOST_COLOURS` of `service.pictures.indexed`.
        opacity: from 0 to 1.
    """

    indices: NDArray[np.uint8]
    colours: tuple[Colour, ...]
    opacity: float


Shape = Circle | Line | Frame | Outline | Area | Label | ColourMap


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Attributes:
        width: of the photo in the picture, pixels.
        height: likewise.
        shapes: over the photo; what lies beyond its edges is not seen.
        opacity: of all shapes together, from 0 to 1.
        gap: pixels between the plain photo to the left and the one with the shapes; `None`: there
            is no plain photo.
    """

    width: int
    height: int
    shapes: tuple[Shape, ...]
    opacity: float = 1.0
    gap: int | None = None

    @property
    def left(self) -> int:
        """Where the photo with the shapes begins, pixels."""
        return 0 if self.gap is None else self.width + self.gap

    @property
    def full_width(self) -> int:
        """Of the whole picture, pixels."""
        return self.left + self.width
