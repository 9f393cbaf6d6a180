"""What the windows of a Swin see, in pixels of the uploaded image."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from model.swin_config import SwinConfig, Windows
from service.tasks.points import CellLayer, PixelMap

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class WindowLayer(CellLayer):
    """The last block of one stage, whose keys are the cells of its padded map.

    Attributes:
        windows: where they lie.
    """

    windows: Windows

    def key_points(self, pixel_map: PixelMap) -> NDArray[np.float32]:
        """The centre of each key `(PH, PW, 2)`, (x, y), in pixels of the uploaded image.

        Those of the padding lie right of the image or below it.
        """
        rows, columns = map(np.arange, self.windows.padded_size)
        cells_xy = np.stack(np.meshgrid(columns, rows), -1)
        return pixel_map.to_image(self.first_cell + self.cell_stride * cells_xy).astype(np.float32)

    def keys_seen(self, cell: tuple[int, int]) -> NDArray[np.int64]:
        """The keys of the query `(row, column)`, along the rows of the padded map."""
        top, left, bottom, right = self.windows.seen_from(*cell)
        _, width = self.windows.padded_size
        rows, columns = np.arange(top, bottom), np.arange(left, right)
        keys: NDArray[np.int64] = (rows[:, None] * width + columns).ravel()
        return keys

    def window(self, cell: tuple[int, int], pixel_map: PixelMap) -> Box:
        """`(x1, y1, x2, y2)` around the keys of the query `(row, column)`, in the same pixels."""
        top, left, bottom, right = self.windows.seen_from(*cell)
        corners_xy = np.array([(left, top), (right, bottom)]) - 0.5
        x1, y1, x2, y2 = pixel_map.to_image(self.first_cell + self.cell_stride * corners_xy).ravel()
        return float(x1), float(y1), float(x2), float(y2)

    def cell_size(self, pixel_map: PixelMap) -> tuple[float, float]:
        """`(w, h)` of a cell, in the same pixels."""
        width, height = np.ptp(pixel_map.to_image([(0, 0), (self.cell_stride,) * 2]), axis=0)
        return float(width), float(height)


@lru_cache(maxsize=64)
def window_layers(config: SwinConfig) -> tuple[WindowLayer, ...]:
    """The geometry of the last block of each stage, in the order of the engine's output."""
    layers = []
    for stage, depth in enumerate(config.depths):
        stride, first = config.cell_geometry(stage)
        windows = config.windows(stage, depth - 1)
        height, width = windows.map_size
        layers.append(WindowLayer(stage, depth - 1, (width, height), stride, first, windows))
    return tuple(layers)
