"""Masks of objects as clients read them: COCO run lengths, polygons, PNG."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bits = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Mask:
    """The pixels of an object; outside of this part of the image there are none.

    Attributes:
        top: first row of the part, pixels.
        left: first column of the part, pixels.
        pixels: `(h, w)`.
        image_size: `(H, W)` of the whole image, pixels.
    """

    top: int
    left: int
    pixels: Bits
    image_size: tuple[int, int]


@dataclass(frozen=True)
class RunLengths:
    """COCO's compressed run lengths of a whole image of `(H, W)` pixels."""

    image_size: tuple[int, int]
    counts: str


@dataclass(frozen=True)
class Polygons:
    """Closed rings `(n, 2)` of (x, y) in pixels, to be filled by the even-odd rule."""

    rings: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class PngMask:
    """A PNG of one bit a pixel, and where its top-left corner lies in the image, pixels."""

    png: bytes
    left: int
    top: int


EncodedMask = RunLengths | Polygons | PngMask
MaskFormat = Literal["rle", "polygon", "png"]


def encode(mask: Mask, form: MaskFormat) -> EncodedMask:
    """A mask as clients read it."""
    if form == "rle":
        return RunLengths(mask.image_size, run_lengths(mask))
    if form == "polygon":
        return Polygons(tuple(polygons(mask)))
    return PngMask(png(mask), mask.left, mask.top)


def run_lengths(mask: Mask) -> str:
    """The compressed run lengths of the whole image, as COCO writes them.

    Runs of zeros and ones alternate, zeros first, down the columns; the text is that of the
    `counts` of pycocotools (its size is the image's).
    """
    H, W = mask.image_size
    rim = np.zeros((1, mask.pixels.shape[1]), np.int8)
    steps = np.diff(np.concatenate((rim, mask.pixels.astype(np.int8), rim)), axis=0)
    starts, ends = (_places(steps == step, mask, H) for step in (1, -1))
    # A run that reaches the bottom of the image goes on at the top of the next column.
    whole = starts[1:] != ends[:-1]
    starts = np.concatenate((starts[:1], starts[1:][whole]))
    ends = np.concatenate((ends[:-1][whole], ends[-1:]))
    return counts_text(starts, ends, H * W)


def counts_text(starts: Integers, ends: Integers, pixels: int) -> str:
    """COCO's compressed counts of the runs of ones in an image.

    Args:
        starts: of each run, counted down the columns of the image, ascending.
        ends: likewise, behind the last pixel of each; the next run begins later.
        pixels: of the image.
    """
    borders = np.stack((starts, ends), 1).ravel()
    counts = np.diff(borders, prepend=0, append=pixels)
    return _compressed(counts[: -1 if counts[-1] == 0 else None])


def _places(found: Bits, mask: Mask, height: int) -> Integers:
    """Where something was found, counted down the columns of the whole image."""
    columns, rows = np.nonzero(found.T)
    return (mask.left + columns) * height + mask.top + rows


def _compressed(counts: Integers) -> str:
    """COCO's text: from the fourth count on the difference to the one before the last.

    A number is written in groups of five bits, lowest first; the sixth bit says that more follow,
    and the highest bit of the last group is the sign.
    """
    values = counts.copy()
    values[3:] -= counts[1:-2]
    groups: list[NDArray[np.uint8]] = []
    more = np.ones(len(values), bool)
    written = []
    while more.any():
        low = values & 0x1F
        values >>= 5
        goes_on = more & np.where(low & 0x10, values != -1, values != 0)
        groups.append((low + 48 + 32 * goes_on).astype(np.uint8))
        written.append(more)
        more = goes_on
    text: bytes = np.stack(groups, 1)[np.stack(written, 1)].tobytes()
    return text.decode("ascii")


def polygons(mask: Mask) -> list[NDArray[np.int64]]:
    """The outlines of the pixels, exactly, as closed rings `(n, 2)` of (x, y) in pixels.

    Pixels that touch at a corner alone belong to different rings. Holes are rings too: filled by
    the even-odd rule, the rings give the mask again.
    """
    padded = np.pad(mask.pixels, 1)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    falling = upper_left & lower_right & ~upper_right & ~lower_left
    rising = upper_right & lower_left & ~upper_left & ~lower_right
    single = upper_left ^ upper_right ^ lower_left ^ lower_right
    # Two corners lie where pixels touch at a point. The first of them has the edge to the left,
    # with the edge upwards where the upper left pixel is set and downwards where it is not.
    rows, columns = np.nonzero(single | falling | rising)
    double = (falling | rising)[rows, columns]
    copies = 1 + double
    corner = np.repeat(np.arange(len(rows)), copies)
    second = np.diff(corner, prepend=-1) == 0
    y, x = rows[corner], columns[corner]
    below = second ^ rising[rows, columns][corner]  # of two, which has the edge downwards
    along_rows = np.lexsort((second, x, y))
    along_columns = np.lexsort((below & double[corner], y, x))
    beside, beyond = np.empty_like(corner), np.empty_like(corner)
    for order, partner in ((along_rows, beside), (along_columns, beyond)):
        partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    place = np.stack((x + mask.left, y + mask.top), 1)
    return [place[ring] for ring in _rings(beside.tolist(), beyond.tolist())]


def _rings(beside: list[int], beyond: list[int]) -> list[list[int]]:
    """Follow horizontal and vertical edges in turn."""
    rings = []
    left = dict.fromkeys(range(len(beside)))
    while left:
        ring, at = [], next(iter(left))
        while at in left:
            for partner in (beside, beyond):
                del left[at]
                ring.append(at)
                at = partner[at]
        rings.append(ring)
    return rings


def png(mask: Mask) -> bytes:
    """The part of the image as a PNG of one bit a pixel, white inside."""
    file = io.BytesIO()
    Image.fromarray(mask.pixels).save(file, "PNG")
    return file.getvalue()
