"""Generated pictures of several objects, some behind others. Knows no model and no torch.

A scene is a function of (seed, index) and the size asked for.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo import canvas
from demo.shapes import CLASSES, Polygon, area, outline

__all__ = [
    "CLASSES",
    "LARGE",
    "LONGEST",
    "SIDES",
    "SMALL",
    "Kind",
    "Scene",
    "scene",
    "upload",
]

# Of uploads, pixels: the shorter side, and how many times as long the longer one may be in
# training.
SIDES = (224, 480)
LONGEST = 8 / 5
_DISTRACTOR = 0.1  # the radius of the distractors, of the root of the picture's area
_CONTRAST = 0.5
_TRIES = 20  # places for one object


@dataclass(frozen=True)
class Kind:
    """What may stand in a scene.

    Attributes:
        most_objects: of the one to so many that there are.
        radii: of the outlines of the smallest and the largest, of the root of the picture's area.
        least_visible: of each object's area, inside the picture and before all others.
    """

    most_objects: int
    radii: tuple[float, float]
    least_visible: float


SMALL = Kind(6, (0.06, 0.24), 0.6)  # what the detector finds
LARGE = Kind(4, (0.14, 0.26), 0.85)  # what the segmenter labels


@dataclass(frozen=True)
class Scene:
    """A picture and what can be seen in it.

    Attributes:
        pixels: RGB, uint8 `(H, W, 3)`.
        labels: indices into `CLASSES`, `(N,)`, the hindmost object first.
        instances: uint8 `(H, W)`: 0 for the background, `n + 1` where object `n` can be seen.
        visible: share of each object's area that can be seen, `(N,)`.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    instances: NDArray[np.uint8]
    visible: NDArray[np.float64]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """What can be seen of every object, `(N, H, W)`."""
        masks: NDArray[np.bool_] = (
            self.instances == np.arange(1, len(self.labels) + 1)[:, None, None]
        )
        return masks

    @property
    def boxes(self) -> NDArray[np.float32]:
        """The least boxes around that, `(N, 4)`, corners in pixels."""
        return np.array([enclosing(mask) for mask in self.masks], np.float32)


def enclosing(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return the corners `(x1, y1, x2, y2)` of the least box around a mask `(H, W)`, pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class _Object:
    label: int
    radius: float
    centre: canvas.Vector
    shape: Polygon


def scene(
    seed: int,
    index: int,
    height: int,
    width: int,
    kind: Kind = SMALL,
) -> Scene:
    """Render scene `index` of the series `seed`.

    Some objects stand before others, some leave the picture.
    """
    rng = np.random.default_rng((seed, index))
    unit = math.sqrt(height * width)
    objects, instances = _arranged(rng, height, width, kind)

    picture, avoided = canvas.background(rng, height, width)
    canvas.scatter(picture, rng, _DISTRACTOR * unit)
    for placed in objects:
        colour = canvas.far(avoided, _CONTRAST, rng)
        avoided = np.concatenate([avoided, [colour]])
        if rng.random() < 0.5:
            shadow = placed.shape + placed.radius * rng.uniform(-0.12, 0.12, 2)
            canvas.paint(picture, shadow, np.zeros(3), 0.4, placed.radius / 8)
        canvas.paint(picture, placed.shape, canvas.textured(colour, rng, height, width))
    labels = np.array([placed.label for placed in objects], np.int64)
    visible = _visible(objects, instances)
    return Scene(canvas.exposed(picture, rng), labels, instances, visible)


def upload(
    seed: int,
    index: int,
    longest: float = LONGEST,
    kind: Kind = SMALL,
) -> tuple[Scene, bytes]:
    """Return scene `index` of the series `seed` at a random size, and as a JPEG file.

    The shorter side is as `SIDES` says, the longer one at most `longest` times as long; qualities
    are between 55 and 95.
    """
    rng = np.random.default_rng((seed, index, 1))
    shorter = int(rng.integers(SIDES[0], SIDES[1] + 1))
    longer = int(rng.uniform(1, longest) * shorter)
    height, width = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    rendered = scene(seed, index, height, width, kind)
    return rendered, canvas.jpeg(rendered.pixels, int(rng.integers(55, 96)))


def _arranged(
    rng: np.random.Generator, height: int, width: int, kind: Kind
) -> tuple[list[_Object], NDArray[np.uint8]]:
    """Place objects, the hindmost first, and draw which of them is seen where, `(H, W)`."""
    objects: list[_Object] = []
    instances = np.zeros((height, width), np.uint8)
    for _ in range(rng.integers(1, kind.most_objects + 1)):
        for _ in range(_TRIES):
            tried = _candidate(rng, objects, height, width, kind.radii)
            part, share = canvas.coverage(tried.shape, height, width)
            seen = instances.copy()
            seen[part][share >= 128] = len(objects) + 1
            if (_visible([*objects, tried], seen) >= kind.least_visible).all():
                objects.append(tried)
                instances = seen
                break
    return objects, instances


def _visible(objects: list[_Object], instances: NDArray[np.uint8]) -> NDArray[np.float64]:
    areas = np.array([area(placed.shape) for placed in objects])
    pixels = np.bincount(instances.ravel(), minlength=len(objects) + 1)[1:]
    visible: NDArray[np.float64] = np.minimum(pixels / areas, 1)
    return visible


def _candidate(
    rng: np.random.Generator,
    objects: list[_Object],
    height: int,
    width: int,
    radii: tuple[float, float],
) -> _Object:
    label = int(rng.integers(len(CLASSES)))
    radius = math.exp(rng.uniform(*np.log(radii))) * math.sqrt(height * width)
    centre = rng.uniform(0, 1, 2) * (width, height)
    if objects and rng.random() < 0.5:
        # Before another object: places drawn evenly would seldom overlap.
        behind = objects[rng.integers(len(objects))]
        angle = rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(0.4, 1) * (radius + behind.radius)
        centre = behind.centre + distance * np.array([np.cos(angle), np.sin(angle)])
    shape = canvas.placed(outline(CLASSES[label], rng), rng, centre, radius)
    return _Object(label, radius, centre, shape)
