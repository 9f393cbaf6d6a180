"""Where the points of deformable layers start from: what follows from a configuration alone.

Positions are in the coordinates of `model.attention`, where -1 and +1 are the centres of the first
and the last cell of a map. Nothing here needs torch or weights, so that a process without either
can say where a model looked.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.config import DatConfig, Family

# Of an image: those whose attention can be asked for, and those that the model can choose. No map
# has fewer cells than can be chosen.
MOST_QUERIES, CHOSEN_QUERIES = 8, 4


class LayerGeometry(NamedTuple):
    """One deformable layer.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        map_size: `(H, W)` of the feature map, cells.
        reference_points: `(Hk, Wk, 2)`, (y, x), float32.
    """

    stage: int
    block: int
    map_size: tuple[int, int]
    reference_points: NDArray[np.float32]


def reference_axis(family: Family, size: int) -> NDArray[np.float64]:
    """Positions `(size,)` of the reference points along one axis.

    In DAT they are inside (-1, 1) and symmetric. The grid of DAT++ is the checkpoints' own: it lies
    half a cell towards the end of the axis, where it leaves [-1, 1].
    """
    cells = size if family == "dat" else size - 1
    return (np.arange(size, dtype=np.float64) + 0.5) * (2 / cells) - 1


def query_axis(family: Family, size: int) -> NDArray[np.float64]:
    """Positions `(size,)` of the queries along one axis, as the bias sees them."""
    return reference_axis("dat", size) if family == "dat" else np.linspace(-1, 1, size)


def deformable_layers(
    config: DatConfig, image_size: tuple[int, int] | None = None
) -> Iterator[LayerGeometry]:
    """The deformable layers in the order of the forward pass.

    Args:
        config: of the network.
        image_size: `(H, W)` of its input, pixels, if not that of the configuration.
    """
    for index, stage in enumerate(config.stages):
        height, width = config.map_size(index, image_size)
        for block, kind in enumerate(stage.blocks):
            if kind == "D":
                # Odd kernels with half their size as padding: Hk = ceil(H / stride).
                keys = (-(-side // stage.offset_stride) for side in (height, width))
                axes = (reference_axis(config.family, side) for side in keys)
            elif kind == "Q":
                axes = (np.linspace(-1, 1, side) for side in (height, width))
            else:
                continue
            points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)
            if kind == "Q":  # each query has its own, all of which start from its cell
                points = points.reshape(-1, 1, 2).repeat(stage.points, 1)
            yield LayerGeometry(index, block, (height, width), points)
