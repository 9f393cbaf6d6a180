"""The regions of an image in a picture, one of each class: their colours, and their names."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from service.pictures.colours import Colour
from service.pictures.lettering import Wanted, plate_size
from service.pictures.shapes import ColourMap

# The larger side of the map in which the middle of a region is looked for, cells.
_COARSE = 320
# A name is written where its region has so much room around, in heights of its plate.
_ROOM = 0.3
_LEAST_PERCENT = 0.005


@dataclass(frozen=True)
class NamedRegion:
    """The pixels of one class, with their share of the image."""

    label: str
    index: int
    share: float


@dataclass(frozen=True)
class Regions:
    """What the pixels of an image are.

    Attributes:
        indices: `(H, W)`, of the class of each pixel; of no class the one behind the last.
        colours: of the classes.
        named: those that are in the image, the largest first.
        opacity: of the colours.
    """

    indices: NDArray[np.uint8]
    colours: tuple[Colour, ...]
    named: tuple[NamedRegion, ...]
    opacity: float

    def colour_map(self, size: tuple[int, int]) -> ColourMap:
        """Their colours in a picture whose photo has `(W, H)` pixels."""
        return ColourMap(_resized(self.indices, size), self.colours, self.opacity)

    def names(self, size: tuple[int, int], font_size: int, *, shares: bool) -> Iterator[Wanted]:
        """Their names in the picture, in the middle of each region that has room.

        Args:
            size: `(W, H)` of the photo in the picture, pixels.
            font_size: pixels.
            shares: whether to write the shares beside the names.
        """
        scale = min(1.0, _COARSE / max(size))
        coarse_size = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
        coarse = _resized(self.indices, coarse_size)
        for region in self.named:
            # The edge of the image is an edge of the region.
            inside = np.pad((coarse == region.index).astype(np.uint8), 1)
            depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
            row, column = np.unravel_index(int(depth.argmax()), depth.shape)
            text = f"{region.label} {_percent(region.share)}" if shares else region.label
            width, height = plate_size(text, font_size)
            if depth[row, column] / scale < _ROOM * height:
                continue
            x, y = (float(column) + 0.5) / scale, (float(row) + 0.5) / scale
            bottom = y + height / 2
            box = x - width / 2, bottom, x + width / 2, bottom
            yield Wanted(text, box, self.colours[region.index])


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= _LEAST_PERCENT else "<1%"


def _resized(indices: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(indices, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)
