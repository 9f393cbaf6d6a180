"""Text of labels: how wide it is, and where labels lie so that none covers another."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from PIL import ImageFont

from service.pictures.colours import BLACK, Colour, ink_on
from service.pictures.shapes import Label

_LONGEST = 40  # characters
_CUT = "..."
_SIZES = 64  # of fonts that are kept
_WIDEST = 1 << 16  # pixels, of any picture


class Wanted(NamedTuple):
    """A label that is to lie beside a box `(x1, y1, x2, y2)`, pixels of the picture."""

    text: str
    box: tuple[float, float, float, float]
    colour: Colour


@lru_cache(_SIZES)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow, in a size of pixels."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "Pillow has FreeType"
    return loaded


def printable(text: str) -> str:
    """A text on one line: names of classes come from checkpoints, and may hold anything."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return clean if len(clean) <= _LONGEST else clean[: _LONGEST - len(_CUT)] + _CUT


def place(wanted: Sequence[Wanted], picture: tuple[int, int], size: int) -> list[Label]:
    """Lay labels out beside their boxes; the first have the first choice.

    A label that is wider than the picture is cut. One for which no place is left is left out.

    Args:
        wanted: the labels, the most important first.
        picture: `(W, H)` in which they lie, pixels.
        size: of the font, pixels.
    """
    placed: list[Label] = []
    for one in wanted:
        label = _label(one, picture[0], size)
        if label is None:
            continue
        for left, top in _places(label, one.box, picture):
            moved = replace(label, left=left, top=top)
            if _is_within(moved, picture) and not any(overlap(moved, other) for other in placed):
                placed.append(moved)
                break
    return placed


def plate_size(text: str, size: int) -> tuple[int, int]:
    """Width and height of the plate of a text in a font of that size, pixels; 0 without letters."""
    label = _label(Wanted(text, (0, 0, 0, 0), BLACK), _WIDEST, size)
    return (0, 0) if label is None else (int(label.width), int(label.height))


def overlap(one: Label, other: Label) -> bool:
    """Whether the plates of two labels cover each other."""
    return (
        one.left < other.left + other.width
        and other.left < one.left + one.width
        and one.top < other.top + other.height
        and other.top < one.top + one.height
    )


def _label(wanted: Wanted, widest: int, size: int) -> Label | None:
    """A label at the origin; `None` where not even a part of its text fits."""
    letters = font(size)
    padding = ceil(size / 4)
    text = printable(wanted.text)
    room = widest - 2 * padding
    while text and letters.getlength(text) > room:
        text = text[: -len(_CUT) - 1] + _CUT if len(text) > len(_CUT) + 1 else ""
    if not text:
        return None
    ascent, descent = letters.getmetrics()
    return Label(
        left=0,
        top=0,
        width=ceil(letters.getlength(text)) + 2 * padding,
        height=ascent + descent + padding,
        padding=padding,
        text=text,
        size=size,
        baseline=ascent + padding / 2,
        paper=wanted.colour,
        ink=ink_on(wanted.colour),
    )


def _places(
    label: Label, box: tuple[float, float, float, float], picture: tuple[int, int]
) -> Iterator[tuple[float, float]]:
    """Where a label may lie, the best places first: at its box, then ever further away."""
    x1, y1, x2, y2 = (float(round(side)) for side in box)
    width, height = label.width, label.height
    most_left, most_top = picture[0] - width, picture[1] - height

    def within(left: float, top: float) -> tuple[float, float]:
        return min(max(left, 0), most_left), min(max(top, 0), most_top)

    yield within(x1, y1 - height)
    yield within(x2 - width, y1 - height)
    yield within(x1, y1)
    yield within(x1, y2)
    yield within(x2 - width, y2)
    yield within(x1, y2 - height)
    yield within(x2, y1)
    yield within(x1 - width, y1)
    for step in range(1, ceil(picture[1] / height) + 1):
        for left in (x1, x2 - width, x2, x1 - width):
            yield within(left, y1 - height + step * height)
            yield within(left, y1 - height - step * height)


def _is_within(label: Label, picture: tuple[int, int]) -> bool:
    return (
        label.left >= 0
        and label.top >= 0
        and label.left + label.width <= picture[0]
        and label.top + label.height <= picture[1]
    )
