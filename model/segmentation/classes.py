"""Names and colours of the classes of a segmenter, and pictures with them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import openmmlab
from model.checkpoint import Checkpoint, CheckpointError

Palette = tuple[tuple[int, int, int], ...]

_ADE20K = Path(__file__).parent / "ade20k.json"
_ROWS = 256  # of a picture that are blended at a time


def class_names(given: Checkpoint, classes: int) -> tuple[str, ...] | None:
    """The names in order of the class index: those of the file, else ADE20K's for 150 classes.

    They are the data set's own, one of which ends with a blank.

    Raises:
        CheckpointError: names that are not those of the classes.
    """
    names_of_file = openmmlab.class_names(given, classes)
    if names_of_file is None and classes == len(_ade20k()["names"]):
        return tuple(_ade20k()["names"])
    return names_of_file


def class_colours(given: Checkpoint, classes: int) -> Palette:
    """The RGB colours in order of the class index.

    Those of the file; else ADE20K's for 150 classes; else those that Pascal VOC's rule gives.

    Raises:
        CheckpointError: colours that are not those of the classes.
    """
    if "palette" in given.metadata:
        return _palette(given, openmmlab.stored_list(given, "palette"), classes)
    if (stored := given.meta.get("PALETTE")) is not None:
        return _palette(given, stored, classes)
    if classes == len(_ade20k()["palette"]):
        return _palette(given, _ade20k()["palette"], classes)
    return tuple(map(_voc_colour, range(classes)))


def palette_as_text(palette: Palette) -> str:
    """Colours as a checkpoint keeps them, JSON."""
    return json.dumps(palette)


def overlay(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    palette: Palette,
    opacity: float = 0.5,
) -> NDArray[np.uint8]:
    """The colours of labels `(H, W)` over an RGB image `(H, W, 3)`, as mmsegmentation draws them.

    Args:
        pixels: of the image.
        labels: class indices.
        palette: a colour for each class.
        opacity: of the colours, from 0 to 1.
    """
    drawn = np.empty_like(pixels)
    colours = np.array(palette, np.uint8) * float(opacity)
    for top in range(0, len(pixels), _ROWS):
        rows = slice(top, top + _ROWS)
        drawn[rows] = pixels[rows] * (1 - opacity) + colours[labels[rows]]  # rounded down
    return drawn


@cache
def _ade20k() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(_ADE20K.read_text())
    return facts


def _palette(given: Checkpoint, stored: object, classes: int) -> Palette:
    listed = stored if isinstance(stored, (list, tuple)) else ()
    colours = [tuple(colour) if isinstance(colour, (list, tuple)) else () for colour in listed]
    if len(colours) != classes or not all(
        len(colour) == 3 and all(type(part) is int and 0 <= part <= 255 for part in colour)
        for colour in colours
    ):
        raise CheckpointError(
            f"{given.path}: palette, expected {classes} colours of three numbers from 0 to 255"
        )
    return tuple(colours)


def _voc_colour(index: int) -> tuple[int, int, int]:
    """Bits 0, 3 and 6 of the index are the highest of red, bits 1, 4 and 7 of green, ..."""
    red, green, blue = (
        sum((index >> (3 * place + channel) & 1) << (7 - place) for place in range(8))
        for channel in range(3)
    )
    return red, green, blue
