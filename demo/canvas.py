"""Painting of the generated pictures: textures, polygons, distractors, light, files.

A canvas is RGB, float32 `(H, W, 3)` in [0, 1], and painted in place. Knows no classes.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from demo.shapes import Polygon, outline

Vector = NDArray[np.float64]
Field = NDArray[np.float32]

_SUPERSAMPLING = 4
_BACKGROUND_CONTRAST = 0.3


def background(rng: np.random.Generator, height: int, width: int) -> tuple[Field, Vector]:
    """Return a textured canvas, and `(5, 3)` colours from one end of its range to the other."""
    colour = rng.uniform(0.08, 0.92, 3)
    companion = _near(colour, rng)
    canvas = _mix(colour, companion, _pattern(rng, height, width))
    return canvas, np.linspace(colour, companion, 5)


def textured(colour: Vector, rng: np.random.Generator, height: int, width: int) -> Field:
    """Return a texture `(H, W, 3)` of colours close to the given one."""
    other = np.clip(colour + rng.uniform(-0.1, 0.1, 3), 0, 1)
    return _mix(colour, other, _pattern(rng, height, width))


def placed(unit: Polygon, rng: np.random.Generator, centre: Vector, radius: float) -> Polygon:
    """Return an outline of radius 1 at its place in a picture, pixels, at a random angle."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    turned: Polygon = unit @ np.array([[cos, sin], [-sin, cos]])
    return centre + radius * turned


def far(avoided: Vector, contrast: float, rng: np.random.Generator) -> Vector:
    """Return a colour `(3,)` at a distance from all others `(N, 3)`, as far as chance offers it."""
    candidates = rng.uniform(0, 1, (32, 3))
    distances = np.linalg.norm(candidates[:, None] - avoided, axis=2).min(axis=1)
    enough = np.flatnonzero(distances > contrast)
    chosen: Vector = candidates[enough[0] if len(enough) else distances.argmax()]
    return chosen


def scatter(canvas: Field, rng: np.random.Generator, radius: float) -> None:
    """Draw small distractors: blobs, shards and lines, all much smaller than a radius, pixels."""
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
        paint(canvas, placed(shape, rng, centre, extent), colour, rng.uniform(0.4, 1))


def paint(
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
    area, share = coverage(polygon, canvas.shape[0], canvas.shape[1], softness)
    alpha = share.astype(np.float32)[:, :, None] * np.float32(opacity / 255)
    colours = colour[area] if colour.ndim == 3 else colour
    canvas[area] += alpha * (colours - canvas[area])


def coverage(
    polygon: Polygon, height: int, width: int, softness: float = 0.0
) -> tuple[tuple[slice, slice], NDArray[np.uint8]]:
    """Return the part of a picture around a polygon, and how far it covers each pixel there.

    Args:
        polygon: `(N, 2)`, (x, y), pixels; may leave the picture.
        height: of the picture, pixels.
        width: of the picture, pixels.
        softness: standard deviation of the edge's blur, pixels.

    Returns:
        Rows and columns of the part, and its shares `(h, w)`, of which 255 is the whole pixel.
    """
    margin = 2 + 2 * softness
    left, top = np.maximum(np.floor(polygon.min(axis=0) - margin), 0).astype(int)
    right, bottom = np.minimum(
        np.ceil(polygon.max(axis=0) + margin), (width, height)
    ).astype(int)  # fmt: skip
    if left >= right or top >= bottom:
        return np.s_[:0, :0], np.zeros((0, 0), np.uint8)
    box = ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING)
    mask = Image.new("L", box)
    # Pillow's coordinates name pixel centres, ours name corners.
    corners = (polygon - (left, top)) * _SUPERSAMPLING - 0.5
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    mask = mask.reduce(_SUPERSAMPLING)
    if softness:
        mask = mask.filter(ImageFilter.GaussianBlur(softness))
    return np.s_[top:bottom, left:right], np.asarray(mask)


def exposed(canvas: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the pixels of a canvas, uint8 `(H, W, 3)`, in some light and with some grain."""
    _light(canvas, rng)
    grain = rng.uniform(0, 0.03)
    canvas += grain * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)


def jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Encode pixels `(H, W, 3)` as a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _near(colour: Vector, rng: np.random.Generator) -> Vector:
    step = rng.uniform(-1, 1, 3)
    step *= rng.uniform(0.1, _BACKGROUND_CONTRAST) / np.linalg.norm(step)
    return np.clip(colour + step, 0, 1)


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


def _light(canvas: Field, rng: np.random.Generator) -> None:
    """Shade the canvas in place: brightness, a tint, and a fall-off in some direction."""
    height, width = canvas.shape[:2]
    tint = rng.uniform(0.9, 1.1, 3).astype(np.float32) * np.float32(rng.uniform(0.75, 1.1))
    falloff = 1 - rng.uniform(0, 0.4) * _slope(rng, height, width)
    canvas *= falloff[:, :, None].astype(np.float32) * tint
