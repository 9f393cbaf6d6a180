"""Label maps as clients read them: what is known of each class, run lengths, polygons, PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.tasks.masks import Mask, Polygons, RunLengths, counts_text, polygons

Labels = NDArray[np.integer[Any]]
PixelBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part:
    """The pixels of one class.

    Attributes:
        index: of the class.
        pixels: how many there are.
        box: `(x1, y1, x2, y2)` around them, pixels.
    """

    index: int
    pixels: int
    box: PixelBox


def parts(labels: Labels, classes: int) -> list[Part]:
    """The classes in a label map `(H, W)`, the largest first; of equals the lower index."""
    height, width = labels.shape
    counts = np.zeros(classes, np.int64)
    in_rows, in_columns = np.zeros((height, classes), bool), np.zeros((width, classes), bool)
    columns = np.arange(width)
    # Row by row, because the index of a pixel takes eight times the memory of its label.
    for row, seen in zip(labels, in_rows, strict=True):
        of_row = np.bincount(row, minlength=classes)
        counts += of_row
        seen[:] = of_row > 0
        in_columns[columns, row] = True
    tops, lefts = in_rows.argmax(0), in_columns.argmax(0)
    bottoms, rights = height - in_rows[::-1].argmax(0), width - in_columns[::-1].argmax(0)
    boxes = np.stack((lefts, tops, rights, bottoms), 1)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    found = []
    for index in order.tolist():
        x1, y1, x2, y2 = boxes[index].tolist()
        found.append(Part(index, int(counts[index]), (x1, y1, x2, y2)))
    return found


def run_lengths(labels: Labels, indices: Sequence[int]) -> list[RunLengths]:
    """The run lengths of some of the classes in a label map `(H, W)`."""
    height, width = labels.shape
    down_columns = labels.ravel(order="F")
    starts = np.concatenate(([0], np.flatnonzero(down_columns[1:] != down_columns[:-1]) + 1))
    ends = np.append(starts[1:], labels.size)
    classes = down_columns[starts]
    texts = []
    for index in indices:
        own = classes == index
        texts.append(counts_text(starts[own], ends[own], labels.size))
    return [RunLengths((height, width), text) for text in texts]


def turns(labels: Labels) -> int:
    """At how many points of a label map `(H, W)` the outlines of its classes turn."""
    along = labels[:, 1:] != labels[:, :-1]  # (H, W - 1)
    down = labels[1:] != labels[:-1]  # (H - 1, W)
    inside = (along[1:] | along[:-1]) & (down[:, 1:] | down[:, :-1])
    at_borders = along[0], along[-1], down[:, 0], down[:, -1]
    return int(np.count_nonzero(inside) + sum(map(np.count_nonzero, at_borders)) + 4)


def outlines(labels: Labels, part: Part) -> Polygons:
    """The outlines of a class in a label map `(H, W)`."""
    height, width = labels.shape
    left, top, right, bottom = part.box
    pixels = labels[top:bottom, left:right] == part.index
    return Polygons(tuple(polygons(Mask(top, left, pixels, (height, width)))))


def with_others_as_one(labels: Labels, kept: Sequence[int], classes: int) -> Labels:
    """A label map in which pixels of all but some classes have the index behind the last class."""
    dtype = np.promote_types(labels.dtype, np.min_scalar_type(classes))
    indices = np.full(classes, classes, dtype)
    indices[list(kept)] = kept
    chosen = np.empty(labels.shape, dtype)
    for row, of_row in zip(labels, chosen, strict=True):
        of_row[:] = indices[row]
    return chosen


def grey_png(values: NDArray[np.uint8]) -> bytes:
    """Bytes `(H, W)` as a grey PNG."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()
