"""Generated pictures of one object before a busy background. Knows no model and no torch.

A scene is a function of (seed, index) and the size asked for. All lengths are shares of the
picture, so that the same scene at two sizes is the same picture up to resolution and grain.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from demo.shapes import CLASSES, Polygon, outline

__all__ = ["CLASSES", "Scene", "jpeg", "scene"]

Vector = NDArray[np.float64]
Field = NDArray[np.float32]

# Serving keeps the middle 224/256 of each side (`model.transforms`).
_KEPT = 224 / 256
_SUPERSAMPLING = 4
_OBJECT_CONTRAST = 0.6
_BACKGROUND_CONTRAST = 0.3


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
    shape = _placed(outline(CLASSES[label], rng), rng, centre, radius)

    background = rng.uniform(0.08, 0.92, 3)
    companion = _near(background, rng)
    pattern = _pattern(rng, height, width)
    canvas = _mix(background, companion, pattern)
    _scatter(canvas, rng, radius)

    colour = _far(background, companion, rng)
    fill = _mix(colour, np.clip(colour + rng.uniform(-0.1, 0.1, 3), 0, 1),
                _pattern(rng, height, width))  # fmt: skip
    if rng.random() < 0.5:
        _paint(canvas, shape + radius * rng.uniform(-0.12, 0.12, 2), np.zeros(3), 0.4, radius / 8)
    _paint(canvas, shape, fill)

    _light(canvas, rng)
    grain = rng.uniform(0, 0.03)
    canvas += grain * rng.standard_normal(canvas.shape, dtype=np.float32)
    pixels = (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)
    return Scene(pixels, label, (float(centre[0]), float(centre[1])), radius, shape)


def jpeg(rendered: Scene, quality: int) -> bytes:
    """Encode a scene's pixels as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(rendered.pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _placed(unit: Polygon, rng: np.random.Generator, centre: Vector, radius: float) -> Polygon:
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turned: Polygon = unit @ np.array([[cos, sin], [-sin, cos]])
    return centre + radius * turned


def _near(colour: Vector, rng: np.random.Generator) -> Vector:
    step = rng.uniform(-1, 1, 3)
    step *= rng.uniform(0.1, _BACKGROUND_CONTRAST) / np.linalg.norm(step)
    return np.clip(colour + step, 0, 1)


def _far(first: Vector, second: Vector, rng: np.random.Generator) -> Vector:
    """Return a colour that stands out from two others and from everything between them."""
    candidates = rng.uniform(0, 1, (32, 3))
    between = np.linspace(first, second, 5)
    distances = np.linalg.norm(candidates[:, None] - between, axis=2).min(axis=1)
    enough = np.flatnonzero(distances > _OBJECT_CONTRAST)
    chosen: Vector = candidates[enough[0] if len(enough) else distances.argmax()]
    return chosen


def _mix(first: Vector, second: Vector, share: Field) -> Field:
    low, high = first.astype(np.float32), second.astype(np.float32)
    mixed: Field = low + (high - low) * share[:, :, None]
    return mixed


def _pattern(rng: np.random.Generator, height: int, width: int) -> Field:
    """Return a texture of values in [0, 1], `(height, width)`."""
    kind = rng.choice(["clouds", "tiles", "gradient", "stripes"])
    if kind == "clouds":
        coarse = _noise(rng, (3, 7), height, width, Image.Resampling.BICUBIC)
        fine = _noise(rng, (12, 40), height, width, Image.Resampling.BICUBIC)
        return coarse + (fine - coarse) * np.float32(0.3)
    if kind == "tiles":
        return _noise(rng, (5, 16), height, width, Image.Resampling.NEAREST)
    slope = _slope(rng, height, width)
    if kind == "gradient":
        return slope
    stripes: Field = 0.5 + 0.5 * np.sin(slope * np.float32(rng.uniform(15, 70)))
    return stripes


def _noise(
    rng: np.random.Generator,
    cells: tuple[int, int],
    height: int,
    width: int,
    resample: Image.Resampling,
) -> Field:
    side = int(rng.integers(*cells))
    grid = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
    return np.asarray(grid.resize((width, height), resample), dtype=np.float32) / np.float32(255)


def _slope(rng: np.random.Generator, height: int, width: int) -> Field:
    """Return a plane that rises from 0 to 1 across the picture in some direction."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.ogrid[-0.5 : 0.5 : height * 1j, -0.5 : 0.5 : width * 1j]
    rise = x * np.cos(angle) + y * np.sin(angle)
    plane = 0.5 + rise / (abs(np.cos(angle)) + abs(np.sin(angle)))
    return np.asarray(plane, dtype=np.float32)


def _scatter(canvas: Field, rng: np.random.Generator, radius: float) -> None:
    """Draw small distractors: blobs, shards and lines, all much smaller than the object."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(2, 8)):
        centre = rng.uniform(0, 1, 2) * (width, height)
        extent = radius * rng.uniform(0.06, 0.2)
        kind = rng.integers(3)
        if kind == 0:
            shape = outline("circle", rng) * (1, rng.uniform(0.4, 1))
        elif kind == 1:
            shape = rng.uniform(-1, 1, (rng.integers(3, 6), 2))
        else:
            shape = np.array([[-1, -0.03], [1, -0.03], [1, 0.03], [-1, 0.03]])
            extent *= rng.uniform(2, 8)
        colour = rng.uniform(0, 1, 3)
        _paint(canvas, _placed(shape, rng, centre, extent), colour, rng.uniform(0.4, 1))


def _paint(
    canvas: Field,
    polygon: Polygon,
    colour: Vector | Field,
    opacity: float = 1.0,
    softness: float = 0.0,
) -> None:
    """Blend a polygon onto the canvas in place.

    Args:
        canvas: `(H, W, 3)`.
        polygon: `(N, 2)`, (x, y), pixels.
        colour: one colour `(3,)`, or one per pixel of the canvas `(H, W, 3)`.
        opacity: 1 hides what lies below.
        softness: standard deviation of the edge's blur, pixels.
    """
    height, width = canvas.shape[:2]
    margin = 2 + 2 * softness
    left, top = np.maximum(np.floor(polygon.min(axis=0) - margin), 0).astype(int)
    right, bottom = np.minimum(
        np.ceil(polygon.max(axis=0) + margin), (width, height)
    ).astype(int)  # fmt: skip
    if left >= right or top >= bottom:
        return
    box = ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING)
    mask = Image.new("L", box)
    # Pillow's coordinates name pixel centres, ours name corners.
    corners = (polygon - (left, top)) * _SUPERSAMPLING - 0.5
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    mask = mask.reduce(_SUPERSAMPLING)
    if softness:
        mask = mask.filter(ImageFilter.GaussianBlur(softness))
    alpha = np.asarray(mask, dtype=np.float32)[:, :, None] * np.float32(opacity / 255)
    area = np.s_[top:bottom, left:right]
    paint = colour[area] if colour.ndim == 3 else colour
    canvas[area] += alpha * (paint - canvas[area])


def _light(canvas: Field, rng: np.random.Generator) -> None:
    """Shade the canvas in place: brightness, a tint, and a fall-off in some direction."""
    height, width = canvas.shape[:2]
    tint = rng.uniform(0.9, 1.1, 3).astype(np.float32) * np.float32(rng.uniform(0.75, 1.1))
    falloff = 1 - rng.uniform(0, 0.4) * _slope(rng, height, width)
    canvas *= falloff[:, :, None].astype(np.float32) * tint
