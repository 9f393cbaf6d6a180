"""Generated pictures of one object before a busy background. Knows no model and no torch.

A scene is a function of (seed, index) and the size asked for. All lengths are shares of the
picture, so that the same scene at two sizes is the same picture up to resolution and grain.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo import canvas
from demo.shapes import CLASSES, Polygon, outline

__all__ = ["CLASSES", "Scene", "scene"]

# Serving keeps the middle 224/256 of each side (`model.transforms`).
_KEPT = 224 / 256
_OBJECT_CONTRAST = 0.6


@dataclass(frozen=True)
class Scene:
    """A picture and what is known about it.

    Attributes:
        pixels: RGB, uint8 `(H, W, 3)`.
        label: index into `CLASSES`.
        centre_xy: the object's centroid, pixels, origin at the top-left corner of the picture.
        radius: distance from there to the object's farthest corner, pixels.
        outline: the object's edge, a closed polygon `(N, 2)`, (x, y), pixels.
    """

    pixels: NDArray[np.uint8]
    label: int
    centre_xy: tuple[float, float]
    radius: float
    outline: Polygon


def scene(seed: int, index: int, height: int, width: int) -> Scene:
    """Render scene `index` of the series `seed`.

    Classes take turns: the label is `index` modulo their number. The object lies whole inside
    the part of the picture that the centre crop keeps.
    """
    rng = np.random.default_rng((seed, index))
    label = index % len(CLASSES)
    size = np.array([width, height], dtype=np.float64)

    radius = min(rng.uniform(0.2, 0.36) * math.sqrt(width * height), 0.4 * min(width, height))
    reach = _KEPT / 2 * size - radius
    centre = size / 2 + rng.uniform(-1, 1, 2) * reach
    shape = canvas.placed(outline(CLASSES[label], rng), rng, centre, radius)

    picture, colours = canvas.background(rng, height, width)
    canvas.scatter(picture, rng, radius)
    fill = canvas.textured(canvas.far(colours, _OBJECT_CONTRAST, rng), rng, height, width)
    if rng.random() < 0.5:
        shadow = shape + radius * rng.uniform(-0.12, 0.12, 2)
        canvas.paint(picture, shadow, np.zeros(3), 0.4, radius / 8)
    canvas.paint(picture, shape, fill)
    pixels = canvas.exposed(picture, rng)
    return Scene(pixels, label, (float(centre[0]), float(centre[1])), radius, shape)
