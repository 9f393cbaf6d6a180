"""Scenes as the model sees them: JPEG files through the serving preprocessing.

Positions are in the coordinates of sampling locations: (y, x), -1 and +1 at the centres of the
first and the last cell of the last stage's map.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from demo.canvas import jpeg
from demo.scenes import Scene, scene
from model import DatConfig
from model.transforms import Preprocessing, to_model_pixels


@dataclass(frozen=True)
class View:
    """One scene at the model's input.

    Attributes:
        pixels: RGB, uint8 `(R, R, 3)`.
        label: index into `CLASSES`.
        centre_yx: the object's centre as a sampling location, float32 `(2,)`.
        radius: the object's radius in the same unit, mean of both axes.
        coverage: share of every 4 x 4 pixels that the object covers, uint8 `(R / 4, R / 4)`.
    """

    pixels: NDArray[np.uint8]
    label: int
    centre_yx: NDArray[np.float32]
    radius: float
    coverage: NDArray[np.uint8]


def upload(seed: int, index: int, largest: int) -> tuple[Scene, bytes]:
    """Return scene `index` of the series `seed` at a random size, and as a JPEG file.

    Sides are between 128 and `largest` pixels, at most 8 to 5; qualities between 55 and 95.
    """
    rng = np.random.default_rng((seed, index, 1))
    longer = int(rng.integers(205, largest + 1))
    shorter = int(rng.uniform(5 / 8, 1) * longer)
    height, width = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    rendered = scene(seed, index, height, width)
    return rendered, jpeg(rendered.pixels, int(rng.integers(55, 96)))


def view(rendered: Scene, file: bytes, config: DatConfig) -> View:
    """Decode and preprocess a scene's file as the server does."""
    preprocessing = Preprocessing.of(config)
    with Image.open(io.BytesIO(file)) as image:
        pixels = to_model_pixels(image.convert("RGB"), preprocessing)

    height, width = rendered.pixels.shape[:2]
    pixel_map = preprocessing.pixel_map(width, height)
    scale_xy = np.array(pixel_map.scale)
    centre_xy = rendered.centre_xy / scale_xy - pixel_map.offset
    mask = Image.new("L", config.image_size)
    corners = rendered.outline / scale_xy - pixel_map.offset - 0.5
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    coverage = np.asarray(mask.reduce(4))
    centre_yx = location(centre_xy[::-1], config)
    edge_yx = location(centre_xy[::-1] + rendered.radius * (1 / scale_xy).mean(), config)
    radius = float((edge_yx - centre_yx)[0])
    return View(pixels, rendered.label, centre_yx.astype(np.float32), radius, coverage)


def location(pixels_yx: NDArray[np.float64], config: DatConfig) -> NDArray[np.float64]:
    """Sampling locations `(..., 2)` of the last stage from pixels `(..., 2)` of the input."""
    stride, first = config.cell_geometry(3)
    # One unit is half the distance between the first and the last cell.
    unit = stride * (config.map_size(3)[0] - 1) / 2
    return (pixels_yx - first) / unit - 1
