"""Outlines of the demo classes. Knows no pictures and no pixels.

An outline is a closed polygon `(N, 2)`, (x, y), y downwards, with its area's centroid at the
origin and its farthest corner at distance 1. Proportions vary from call to call.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float64]
_CURVE_POINTS = 64


def _arc(start: float, stop: float, radius: float = 1.0, points: int = _CURVE_POINTS) -> Polygon:
    angles = np.linspace(start, stop, points)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _spokes(radii: NDArray[np.float64]) -> Polygon:
    """Corners at the given distances, evenly spread around the origin."""
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _arrow(rng: np.random.Generator) -> Polygon:
    neck = rng.uniform(-0.1, 0.15)
    shaft = rng.uniform(0.18, 0.26)
    barb = rng.uniform(0.6, 0.75)
    half = np.array([[-1.0, shaft], [neck, shaft], [neck, barb]])
    return np.concatenate([half, [[1.0, 0.0]], half[::-1] * (1, -1)])


def _circle(_: np.random.Generator) -> Polygon:
    return _arc(0, 2 * np.pi)


def _crescent(rng: np.random.Generator) -> Polygon:
    horn = np.radians(rng.uniform(50, 65))
    depth = rng.uniform(-0.25, -0.05)
    # The inner edge is the arc through both horns and the point (depth, 0).
    x, y = np.cos(horn), np.sin(horn)
    middle = (x**2 + y**2 - depth**2) / (2 * (x - depth))
    inner_horn = np.arctan2(y, x - middle)
    inner = _arc(2 * np.pi - inner_horn, inner_horn, middle - depth)
    inner[:, 0] += middle
    return np.concatenate([_arc(horn, 2 * np.pi - horn), inner])


def _cross(rng: np.random.Generator) -> Polygon:
    arm = rng.uniform(0.26, 0.36)
    quarter = np.array([[1.0, -arm], [1.0, arm], [arm, arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, n) for n in range(4)])


def _droplet(rng: np.random.Generator) -> Polygon:
    tip = rng.uniform(1.9, 2.4)
    # The straight sides touch the unit circle at the angle whose cosine is 1 / tip.
    touch = np.arccos(1 / tip)
    return np.concatenate([_arc(touch, 2 * np.pi - touch), [[tip, 0.0]]])


def _flower(rng: np.random.Generator) -> Polygon:
    petals = rng.integers(5, 7)
    depth = rng.uniform(0.18, 0.26)
    angles = np.linspace(0, 2 * np.pi, 4 * _CURVE_POINTS, endpoint=False)
    # The absolute value of a sine makes round petals and sharp notches.
    return _spokes(1 - 2 * depth * (1 - np.abs(np.sin(petals * angles / 2))))


def _heart(rng: np.random.Generator) -> Polygon:
    t = np.linspace(0, 2 * np.pi, 2 * _CURVE_POINTS, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    return np.stack([x, y * rng.uniform(0.95, 1.1)], axis=1)


def _hexagon(_: np.random.Generator) -> Polygon:
    return _spokes(np.ones(6))


def _ring(rng: np.random.Generator) -> Polygon:
    # One polygon: out along a seam of no width, and back round the hole.
    return np.concatenate([_arc(0, 2 * np.pi), _arc(2 * np.pi, 0, rng.uniform(0.5, 0.66))])


def _square(_: np.random.Generator) -> Polygon:
    return _spokes(np.ones(4))


def _star(rng: np.random.Generator) -> Polygon:
    return _spokes(np.tile([1.0, rng.uniform(0.36, 0.46)], 5))


def _triangle(_: np.random.Generator) -> Polygon:
    return _spokes(np.ones(3))


_OUTLINES: dict[str, Callable[[np.random.Generator], Polygon]] = {
    "arrow": _arrow,
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "droplet": _droplet,
    "flower": _flower,
    "heart": _heart,
    "hexagon": _hexagon,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}

CLASSES = tuple(_OUTLINES)


def outline(name: str, rng: np.random.Generator) -> Polygon:
    """Return an outline of the named class, centred on its centroid, of radius 1."""
    polygon = _OUTLINES[name](rng)
    polygon -= _centroid(polygon)
    polygon /= np.linalg.norm(polygon, axis=1).max()
    return polygon


def area(polygon: Polygon) -> float:
    """Return the area of a polygon `(N, 2)`."""
    return abs(float(_triangles(polygon).sum())) / 2


def _centroid(polygon: Polygon) -> NDArray[np.float64]:
    following = np.roll(polygon, -1, axis=0)
    return np.average((polygon + following) / 3, axis=0, weights=_triangles(polygon))


def _triangles(polygon: Polygon) -> NDArray[np.float64]:
    """Twice the signed areas `(N,)` between each edge and the origin."""
    following = np.roll(polygon, -1, axis=0)
    doubled: NDArray[np.float64] = polygon[:, 0] * following[:, 1] - following[:, 0] * polygon[:, 1]
    return doubled
