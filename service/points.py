"""Where the model looked: sampling locations as pixels of the uploaded image."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.dat import DAT
from model.transforms import PixelMap


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
class PointLayer:
    """How the positions of one deformable layer become pixels.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        map_size: `(W, H)` of the feature map, cells.
        cell_stride: pixels of the model's input from one cell to the next.
        first_cell: centre of the first cell in the model's input, pixels.
        reference_points: `(Hk, Wk, 2)`, (y, x), normalised.
    """

    stage: int
    block: int
    map_size: tuple[int, int]
    cell_stride: float
    first_cell: float
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


def point_layers(network: DAT) -> tuple[PointLayer, ...]:
    """The geometry of every deformable layer, in the order of the engine's output."""
    layers = []
    for stage, block, attention in network.deformable_layers:
        height, width = network.config.map_size(stage)
        stride, first = network.config.cell_geometry(stage)
        reference = attention.reference_points.numpy()
        layers.append(PointLayer(stage, block, (width, height), stride, first, reference))
    return tuple(layers)
