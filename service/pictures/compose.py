"""From what a model said of an image to the shapes of a picture of it.

Sizes follow the picture: what is two pixels wide in a picture of a thousand is ten in one of 4K,
and in a thumbnail nothing is too thin to be seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import hypot, sqrt

import cv2
import numpy as np
from numpy.typing import NDArray

from service.pictures.colours import BLACK, WHITE, Colour, colour_of
from service.pictures.lettering import Wanted, place
from service.pictures.regions import Regions
from service.pictures.shapes import (
    Area,
    Circle,
    Frame,
    Line,
    Outline,
    Point,
    Ring,
    Shape,
)

Box = tuple[float, float, float, float]

_PIXELS_OF_UNIT, _LEAST_UNIT = 700, 0.75
_LEAST_FONT = 9
_THUMBNAIL = 300  # pixels; labels of a smaller picture have no room for a score
# In units.
_DISC, _STROKE, _EDGE, _HALO, _FONT = 6.0, 1.6, 0.9, 1.2, 13
_HEAD = 7.0  # length of that of an arrow, units
_ORIGIN = 0.45  # radius of a reference point, of that of a point
_LEAST_RADIUS = 1.2  # of a point, pixels
_REACH = 0.2  # the radius of a point in the side of its share of the picture
_MASK_OPACITY = 0.4
# The size of a point that gets no attention, and of the one that gets the most.
_SMALLEST, _LARGEST = 0.4, 2.0
_THINNEST, _THICKEST = 0.5, 3.0  # lines of keys, of a common line
_TILE, _TILE_OPACITY = 0.86, 0.5  # side of that of the heaviest cell, of a cell
_CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
# By which the outline of a mask may be smoothed: in pixels of the picture, and of the image, whose
# corners are steps where it is enlarged.
_RING_ERROR, _STEP = 0.6, 0.8


@dataclass(frozen=True)
class Query:
    """What one query attends to, in pixels of the image.

    Attributes:
        centre: of its cell.
        keys: `(G, n, 2)`, the points of the groups that are drawn, the best first.
        weights: `(G, n)`, of those.
    """

    centre: Point
    keys: NDArray[np.float32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """What is drawn of one deformable layer, in pixels of the image.

    Attributes:
        groups: the numbers of its `G` offset groups that are drawn.
        points: `(G, N, 2)`.
        origins: `(N, 2)`, where the points moved from.
        received: `(G, N)`, the attention of each point.
        queries: whose keys are drawn.
    """

    groups: tuple[int, ...]
    points: NDArray[np.float32]
    origins: NDArray[np.float32]
    received: NDArray[np.float32] | None = None
    queries: tuple[Query, ...] = ()

    @property
    def count(self) -> int:
        """How many points it has."""
        return self.points.size // 2


@dataclass(frozen=True)
class Window:
    """What one query attends to in a window of cells, in pixels of the image.

    Attributes:
        box: `(x1, y1, x2, y2)` around all that it sees.
        centre: of its cell.
        cells: `(n, 2)`, the centres of those that are drawn.
        weights: `(n,)`, of those.
        cell_size: `(w, h)`.
    """

    box: Box
    centre: Point
    cells: NDArray[np.float32]
    weights: NDArray[np.float32]
    cell_size: tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """An object that was found, in pixels of the image.

    Attributes:
        label: its class.
        score: from 0 to 1.
        index: of the class, by which its colour is chosen.
        box: `(x1, y1, x2, y2)`.
        rings: of its mask; none where it is not drawn.
    """

    label: str
    score: float
    index: int
    box: Box
    rings: tuple[NDArray[np.int64], ...] = ()


@dataclass(frozen=True)
class Said:
    """What is to be drawn over an image.

    Attributes:
        width: of the image, pixels.
        height: of the image, pixels.
        layers: in the order of the network.
        windows: of each layer of windows, those of its queries.
        things: best first.
        points: whether the points of the layers are drawn.
        arrows: whether the way from the reference points to them is drawn.
        boxes: whether boxes and labels of things are drawn.
        regions: the classes of all pixels.
    """

    width: int
    height: int
    layers: tuple[Layer, ...] = ()
    windows: tuple[tuple[Window, ...], ...] = ()
    things: tuple[Thing, ...] = field(default=())
    points: bool = True
    arrows: bool = False
    boxes: bool = True
    regions: Regions | None = None


def compose(said: Said, size: tuple[int, int]) -> tuple[Shape, ...]:
    """The shapes of a picture whose photo has `(W, H)` pixels, the lowest first."""
    return tuple(_Composer(said, size).shapes())


class _Composer:
    def __init__(self, said: Said, size: tuple[int, int]) -> None:
        self._said = said
        self._size = size
        self._scale = np.divide(size, (said.width, said.height))
        self._unit = max(_LEAST_UNIT, max(size) / _PIXELS_OF_UNIT)

    def shapes(self) -> Iterator[Shape]:
        said = self._said
        if said.regions is not None:
            yield said.regions.colour_map(self._size)
        for thing in reversed(said.things):  # the best one on top
            yield from self._mask(thing)
        if said.boxes:
            yield from self._frames()
        for number, layer in enumerate(said.layers):
            colours = self._colours(number, layer)
            discs = self._discs(layer, colours) if said.points else []
            if said.arrows:
                yield from self._arrows(layer, colours)
            yield from self._haloed(discs)
        for number, layer in enumerate(said.layers):
            for query in layer.queries:
                yield from self._keys(query, self._colours(number, layer))
        for number, windows in enumerate(said.windows):
            for window in windows:
                yield from self._window(window, colour_of(number))
        if said.boxes:
            yield from self._labels()
        if said.regions is not None:
            small, size = self._is_small, self._font_size
            names = said.regions.names(self._size, size, shares=not small)
            yield from place([*names], self._size, size)

    def _colours(self, number: int, layer: Layer) -> list[Colour]:
        """Of the groups of a layer: one layer alone tells its groups apart, several each other."""
        if len(self._said.layers) == 1:
            return [colour_of(group) for group in layer.groups]
        return [colour_of(number)] * len(layer.groups)

    def _placed(self, points_xy: NDArray[np.float32]) -> NDArray[np.float64]:
        """Pixels of the picture from those of the image."""
        placed: NDArray[np.float64] = points_xy.astype(np.float64) * self._scale
        return placed

    def _radius(self, layer: Layer) -> float:
        """Of a point, so that all of a layer leave most of the picture to be seen."""
        width, height = self._size
        share = sqrt(width * height / layer.count)
        return max(_LEAST_RADIUS, min(_DISC * self._unit, _REACH * share))

    def _mask(self, thing: Thing) -> Iterator[Shape]:
        rings = tuple(self._smoothed(ring) for ring in thing.rings)
        rings = tuple(ring for ring in rings if len(ring) > 2)
        if rings:
            yield Area(rings, colour_of(thing.index), _MASK_OPACITY)
            yield Outline(rings, (_STROKE + 2 * _HALO) * self._unit, WHITE)
            yield Outline(rings, _EDGE * 2 * self._unit, BLACK)

    def _smoothed(self, ring: NDArray[np.int64]) -> Ring:
        placed = self._placed(ring.astype(np.float32)).astype(np.float32)
        error = max(_RING_ERROR, _STEP * float(self._scale.max()))
        fewer = cv2.approxPolyDP(placed[:, None], error, closed=True)
        return np.asarray(fewer, np.float64).reshape(-1, 2)

    def _frames(self) -> Iterator[Shape]:
        unit = self._unit
        frames = []
        for thing in reversed(self._said.things):
            (x1, y1), (x2, y2) = self._placed(np.array(thing.box, np.float32).reshape(2, 2))
            frames.append(((x1, y1, x2, y2), colour_of(thing.index)))
        for extra, colour in ((2 * (_EDGE + _HALO), WHITE), (2 * _EDGE, BLACK), (0.0, None)):
            for box, own in frames:
                corners = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
                yield Frame(corners, (1.2 * _STROKE + extra) * unit, colour or own)

    def _labels(self) -> Iterator[Shape]:
        wanted, small = [], self._is_small
        for thing in self._said.things:
            (x1, y1), (x2, y2) = self._placed(np.array(thing.box, np.float32).reshape(2, 2))
            text = thing.label if small else f"{thing.label} {thing.score:.2f}"
            wanted.append(Wanted(text, (x1, y1, x2, y2), colour_of(thing.index)))
        yield from place(wanted, self._size, self._font_size)

    @property
    def _is_small(self) -> bool:
        return max(self._size) < _THUMBNAIL

    @property
    def _font_size(self) -> int:
        return max(_LEAST_FONT, round(_FONT * self._unit))

    def _discs(self, layer: Layer, colours: Sequence[Colour]) -> list[Circle]:
        radii = self._radii(layer)
        # Large ones first, so that they hide no small ones.
        order = np.argsort(-radii, axis=None, kind="stable").tolist()
        places = self._placed(layer.points).reshape(-1, 2).tolist()
        count = layer.points.shape[1]
        flat = radii.ravel().tolist()
        return [
            Circle((places[index][0], places[index][1]), flat[index], colours[index // count])
            for index in order
        ]

    def _radii(self, layer: Layer) -> NDArray[np.float64]:
        """`(G, N)`, of the points of a layer; the area grows with the attention."""
        groups, count, _ = layer.points.shape
        common = self._radius(layer)
        if layer.received is None:
            return np.full((groups, count), common)
        return common * _grown(layer.received)

    def _arrows(self, layer: Layer, colours: Sequence[Colour]) -> Iterator[Shape]:
        radii = self._radii(layer) if self._said.points else np.zeros(layer.points.shape[:2])
        origins = self._placed(layer.origins)
        arrows = []
        for group, points in enumerate(self._placed(layer.points)):
            ends = zip(origins.tolist(), points.tolist(), radii[group].tolist(), strict=True)
            for start, end, radius in ends:
                arrow = _Arrow.between(start, end, radius, self._unit)
                if arrow is not None:
                    arrows.append((arrow, colours[group]))
        unit = self._unit
        for extra, colour in ((_EDGE + _HALO, WHITE), (_EDGE, BLACK), (0.0, None)):
            for arrow, own in arrows:
                yield from arrow.shapes(_STROKE * unit, extra * unit, colour or own)
        radius = _ORIGIN * self._radius(layer)
        yield from self._haloed([Circle((x, y), radius, WHITE) for x, y in origins.tolist()])

    def _haloed(self, discs: Sequence[Circle]) -> Iterator[Shape]:
        """Discs with a dark edge and a light halo; no halo covers another disc."""
        for disc in discs:
            edge, halo = self._rims(disc.radius)
            yield Circle(disc.centre, disc.radius + edge + halo, WHITE)
        for disc in discs:
            edge, _ = self._rims(disc.radius)
            yield Circle(disc.centre, disc.radius + edge, BLACK)
            yield disc

    def _rims(self, radius: float) -> tuple[float, float]:
        return min(_EDGE * self._unit, 0.4 * radius), min(_HALO * self._unit, 0.5 * radius)

    def _keys(self, query: Query, colours: Sequence[Colour]) -> Iterator[Shape]:
        unit = self._unit
        x, y = self._placed(np.array(query.centre, np.float32)).tolist()
        lines, discs = [], []
        sizes = _grown(query.weights)
        common = _DISC * unit
        for group, points in enumerate(self._placed(query.keys).tolist()):
            for (key_x, key_y), size in zip(points, sizes[group].tolist(), strict=True):
                share = (size / _LARGEST) ** 2
                width = _STROKE * (_THINNEST + share * (_THICKEST - _THINNEST)) * unit
                lines.append(Line((x, y), (key_x, key_y), width, colours[group]))
                discs.append(Circle((key_x, key_y), common * size, colours[group]))
        for extra, colour in ((2 * (_EDGE + _HALO), WHITE), (2 * _EDGE, BLACK), (0.0, None)):
            for line in reversed(lines):
                yield Line(line.start, line.end, line.width + extra * unit, colour or line.colour)
        yield from self._haloed(sorted(discs, key=lambda disc: -disc.radius))
        yield from _target((x, y), common)

    def _window(self, window: Window, colour: Colour) -> Iterator[Shape]:
        """The outline of a window, and tiles in its cells whose area is their weight."""
        unit, common = self._unit, _DISC * self._unit
        x1, y1, x2, y2 = self._placed(np.array(window.box, np.float32).reshape(2, 2)).ravel()
        width, height = self._size
        # What lies beyond the picture, such as padding, is not seen, and its edge is to be.
        inset = (0.6 * _STROKE + _EDGE + _HALO) * unit
        box = max(x1, inset), max(y1, inset), min(x2, width - inset), min(y2, height - inset)
        for extra, ink in ((2 * (_EDGE + _HALO), WHITE), (2 * _EDGE, BLACK), (0.0, colour)):
            yield Frame(box, (1.2 * _STROKE + extra) * unit, ink)
        half = np.multiply(window.cell_size, self._scale) / 2 * _TILE
        shares = window.weights.astype(np.float64) / max(
            float(window.weights.max(initial=0)), 1e-12
        )
        for (x, y), share in zip(self._placed(window.cells).tolist(), shares.tolist(), strict=True):
            tile = (_CORNERS * half * sqrt(share) + (x, y),)
            edge, halo = self._rims(float(half.min()) * sqrt(share))
            yield Area(tile, colour, _TILE_OPACITY)
            yield Outline(tile, 2 * (edge + halo), WHITE)
            yield Outline(tile, edge, BLACK)
        x, y = self._placed(np.array(window.centre, np.float32)).tolist()
        yield from _target((x, y), min(common, max(_LEAST_RADIUS, 0.4 * float(half.min()))))


def _target(centre: Point, size: float) -> Iterator[Shape]:
    """What no key looks like."""
    for radius, colour in ((2.0, WHITE), (1.75, BLACK), (1.3, WHITE), (0.6, BLACK)):
        yield Circle(centre, radius * size, colour)


@dataclass(frozen=True)
class _Arrow:
    """An arrow, with the length of its head; 0 where there is no room for one."""

    start: Point
    end: Point
    head: float

    @classmethod
    def between(
        cls, start: Sequence[float], end: Sequence[float], radius: float, unit: float
    ) -> "_Arrow | None":
        """An arrow up to a disc; `None` where the disc covers all of it."""
        along = end[0] - start[0], end[1] - start[1]
        length = hypot(*along)
        shown = length - radius
        if shown <= unit:
            return None
        tip = start[0] + along[0] * shown / length, start[1] + along[1] * shown / length
        head = _HEAD * unit
        return cls((start[0], start[1]), tip, head if shown > 1.6 * head else 0.0)

    def shapes(self, width: float, rim: float, colour: Colour) -> Iterator[Shape]:
        """The arrow, larger by a rim on every side."""
        (x1, y1), (x2, y2) = self.start, self.end
        length = hypot(x2 - x1, y2 - y1)
        along = (x2 - x1) / length, (y2 - y1) / length
        across = -along[1], along[0]
        neck = x2 - along[0] * self.head, y2 - along[1] * self.head
        yield Line(self.start, neck, width + 2 * rim, colour)
        if self.head:
            half = 0.45 * self.head + 1.5 * rim
            back = neck[0] - along[0] * rim, neck[1] - along[1] * rim
            point = x2 + along[0] * 1.5 * rim, y2 + along[1] * 1.5 * rim
            corners = [
                point,
                (back[0] + across[0] * half, back[1] + across[1] * half),
                (back[0] - across[0] * half, back[1] - across[1] * half),
            ]
            yield Area((np.array(corners),), colour)


def _grown(attention: NDArray[np.float32]) -> NDArray[np.float64]:
    """The factor of the radius of each disc from its attention, by the largest of all."""
    share = attention.astype(np.float64) / max(float(attention.max(initial=0)), 1e-12)
    grown: NDArray[np.float64] = np.maximum(_SMALLEST, _LARGEST * np.sqrt(share.clip(0, 1)))
    return grown
