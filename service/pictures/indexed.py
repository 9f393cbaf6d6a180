"""PNGs whose pixels are indices, with a colour for each."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.pictures.colours import BLACK, Colour

# One more index stands for no colour.
MOST_COLOURS = 255


def indexed_png(indices: NDArray[np.integer[Any]], colours: Sequence[Colour]) -> bytes:
    """Indices `(H, W)` as a PNG; the one behind the last colour is transparent.

    Args:
        indices: of colours.
        colours: at most `MOST_COLOURS`.
    """
    image = Image.fromarray(indices.astype(np.uint8, copy=False))
    image.putpalette(bytes(part for colour in (*colours, BLACK) for part in colour))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=len(colours))
    return file.getvalue()
