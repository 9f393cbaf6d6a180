"""Where the model looked: sampling locations as pixels of the uploaded image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.config import DatConfig
from model.geometry import deformable_layers


class PixelMap(Protocol):
    """The way from the pixels of a model's input to those of the image."""

    def to_image(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)`."""

    def to_input(self, points_xy: ArrayLike) -> NDArray[np.float64]:
        """Map points `(..., 2)` back."""


@dataclass(frozen=True)
class LayerPoints:
    """Where one deformable layer read its keys and values.

    Points are (x, y) in pixels of the uploaded image after its EXIF orientation, from the
    top-left corner of the top-left pixel; they may lie outside the image.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        sampling_locations: `(G, Hk, Wk, 2)`, float32.
        reference_points: `(Hk, Wk, 2)`, float32, where the points of every group moved from.
    """

    stage: int
    block: int
    sampling_locations: NDArray[np.float32]
    reference_points: NDArray[np.float32]


@dataclass(frozen=True)
class CellLayer:
    """Where the cells of one layer lie, and so its queries.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        map_size: `(W, H)` of the feature map, cells.
        cell_stride: pixels of the model's input from one cell to the next.
        first_cell: centre of the first cell in the model's input, pixels.
    """

    stage: int
    block: int
    map_size: tuple[int, int]
    cell_stride: float
    first_cell: float

    def nearest_cells(
        self, points_xy: NDArray[np.float64], within: tuple[int, int]
    ) -> NDArray[np.int64]:
        """The cells nearest to points `(N, 2)` of the model's input, along the rows of the map.

        Args:
            points_xy: in pixels.
            within: `(H, W)` of the input, pixels, in which the centre of a cell lies.
        """
        rows, columns = self.cells_within(within)
        nearest = np.floor((points_xy - self.first_cell) / self.cell_stride + 0.5).astype(np.int64)
        column, row = np.clip(nearest, 0, (columns - 1, rows - 1)).T
        cells: NDArray[np.int64] = row * self.map_size[0] + column
        return cells

    def cells_within(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the cells whose centres lie in `(H, W)` pixels, at least one each."""
        rows, columns = (
            min(most, max(1, ceil((side - self.first_cell) / self.cell_stride)))
            for side, most in zip(size, self.map_size[::-1], strict=True)
        )
        return rows, columns

    def centre(self, cell: tuple[int, int], pixel_map: PixelMap) -> tuple[float, float]:
        """`(x, y)` of the cell `(row, column)` in pixels of the uploaded image."""
        x, y = pixel_map.to_image(self.first_cell + self.cell_stride * np.array(cell[::-1]))
        return float(x), float(y)


@dataclass(frozen=True)
class PointLayer(CellLayer):
    """How the positions of one deformable layer become pixels.

    Attributes:
        reference_points: `(Hk, Wk, 2)`, (y, x), normalised.
    """

    reference_points: NDArray[np.float32]

    def points(self, locations: NDArray[np.float32], pixel_map: PixelMap) -> LayerPoints:
        """Pixels of the uploaded image from `(G, Hk, Wk, 2)` normalised (y, x)."""
        return LayerPoints(
            self.stage,
            self.block,
            self._pixels(locations, pixel_map),
            self._pixels(self.reference_points, pixel_map),
        )

    def _pixels(
        self, locations_yx: NDArray[np.float32], pixel_map: PixelMap
    ) -> NDArray[np.float32]:
        # -1 and +1 are the centres of the first and the last cell (align_corners).
        last_cell = np.subtract(self.map_size, 1)
        cells_xy = (locations_yx[..., ::-1].astype(np.float64) + 1) / 2 * last_cell
        model_xy = self.first_cell + self.cell_stride * cells_xy
        return pixel_map.to_image(model_xy).astype(np.float32)


@lru_cache(maxsize=64)
def point_layers(config: DatConfig, image_size: tuple[int, int]) -> tuple[PointLayer, ...]:
    """The geometry of every deformable layer, in the order of the engine's output.

    Args:
        config: of the classifier, or of the backbone.
        image_size: `(H, W)` of its input, pixels.
    """
    layers = []
    for stage, block, (height, width), reference in deformable_layers(config, image_size):
        stride, first = config.cell_geometry(stage)
        layers.append(PointLayer(stage, block, (width, height), stride, first, reference))
    return tuple(layers)


def explained(
    config: DatConfig,
    image_size: tuple[int, int],
    sampling_locations: Sequence[NDArray[np.float32]],
    pixel_map: PixelMap,
) -> tuple[LayerPoints, ...]:
    """Where every deformable layer looked, in pixels of the uploaded image.

    Args:
        config: as in `point_layers`.
        image_size: likewise.
        sampling_locations: what the device said, for each layer `(G, Hk, Wk, 2)`.
        pixel_map: from the model's input to the uploaded image.
    """
    layers = point_layers(config, image_size)
    return tuple(
        layer.points(locations, pixel_map)
        for layer, locations in zip(layers, sampling_locations, strict=True)
    )
