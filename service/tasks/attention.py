"""What chosen queries attend to, in pixels of the uploaded image."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.config import DatConfig
from model.geometry import CHOSEN_QUERIES, MOST_QUERIES
from model.swin_config import SwinConfig
from service.engine.items import Cells, LayerAttention, Wanted
from service.errors import InvalidOption
from service.tasks.points import LayerPoints, PixelMap, PointLayer, point_layers
from service.tasks.windows import Box, WindowLayer, window_layers

MOST_LAYERS = 4  # of a request
MOST_KEYS, DEFAULT_KEYS = 32, 8  # of a query

Point = tuple[float, float]
Queries = tuple[Point, ...] | Literal["auto"]
Layer = tuple[int, int]
Config = DatConfig | SwinConfig


@dataclass(frozen=True)
class AttentionOptions:
    """What a request with `explain=attention` may ask for.

    Attributes:
        queries: `(x, y)` in pixels of the uploaded image after its EXIF orientation, or `auto`:
            in each layer, the cells that receive the most attention. `None` means the centre.
        layers: `(stage, block)`, from 0; none means the last deformable layer of each of the last
            two stages that have one. Of a Swin the last block of each stage can be named.
        top_n: keys of each query, best first; `None` means `DEFAULT_KEYS`.
    """

    queries: Queries | None = None
    layers: tuple[Layer, ...] = ()
    top_n: int | None = None


@dataclass(frozen=True)
class AttendedQuery:
    """What one query attends to, the `n` keys that count the most.

    A weight is the sum of the softmax over heads: those of an offset group, or all of the layer.
    A key has a point in each group. Points are `(x, y)` in pixels of the uploaded image, as in
    `LayerPoints`. Of a Swin each head is a group of its own, and the points of a key are the
    centre of its cell.

    Attributes:
        cell: `(row, column)` of the query in the map of the layer.
        centre: `(x, y)` of that cell, like a point.
        group_keys: `(G, n)`, in each group, the best first; along the rows of the points.
        group_weights: `(G, n)`, of those keys.
        group_points: `(G, n, 2)`, the point of each in its group.
        keys: `(n,)`, over all groups, the best first.
        weights: `(n,)`, of those keys.
        points: `(n, G, 2)`, the points of each.
        window: of a Swin, `(x1, y1, x2, y2)` around the cells that it sees.
        cell_size: of a Swin, `(w, h)` of one of these.
    """

    cell: tuple[int, int]
    centre: Point
    group_keys: NDArray[np.int64]
    group_weights: NDArray[np.float32]
    group_points: NDArray[np.float32]
    keys: NDArray[np.int64]
    weights: NDArray[np.float32]
    points: NDArray[np.float32]
    window: Box | None = None
    cell_size: tuple[float, float] | None = None


@dataclass(frozen=True)
class AttendedLayer:
    """The attention in one deformable layer, or one of windows.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        received: `(G, Hk, Wk)`, the sum of the weights that each point has for all queries of the
            map, in its group.
        queries: in the order of the request, or the most attended first.
    """

    stage: int
    block: int
    received: NDArray[np.float32]
    queries: tuple[AttendedQuery, ...]


@dataclass(frozen=True)
class Seen:
    """How a network sees one image.

    Attributes:
        config: of the network.
        input_size: `(H, W)` of its input, pixels.
        resized: `(H, W)` of the part of the input that is no padding, pixels.
        image_size: `(H, W)` of the uploaded image, pixels.
        pixel_map: from the input to the image.
    """

    config: Config
    input_size: tuple[int, int]
    resized: tuple[int, int]
    image_size: tuple[int, int]
    pixel_map: PixelMap


def check(options: AttentionOptions, config: Config, *, asked: bool, model: str) -> None:
    """Refuse what a model cannot show.

    Args:
        options: of the request.
        config: of the classifier, or of the backbone.
        asked: whether attention is to be explained.
        model: its name.

    Raises:
        InvalidOption: the message says which option and why.
    """
    if not asked:
        if options != AttentionOptions():
            raise InvalidOption(
                "queries, layers and top_n are for explain=attention, and for objects of detectors"
            )
        return
    known = explained_layers(config)
    if not known:
        raise InvalidOption(f"{model} has no deformable attention to explain")
    check_layers(options.layers, known, model)
    if options.top_n is not None and not 1 <= options.top_n <= MOST_KEYS:
        raise InvalidOption(f"top_n must be from 1 to {MOST_KEYS}, not {options.top_n}")
    if options.queries is None or options.queries == "auto":
        return
    if not 1 <= len(options.queries) <= MOST_QUERIES:
        raise InvalidOption(
            f"queries must be 1 to {MOST_QUERIES} positions or auto; there are "
            f"{len(options.queries)}"
        )
    if not all(isfinite(number) for query in options.queries for number in query):
        raise InvalidOption("queries has a position that is not a number")


def check_layers(layers: Sequence[Layer], known: Collection[Layer], model: str) -> None:
    """Refuse layers that cannot be shown, or not at once.

    Args:
        layers: that a request names.
        known: those of which it may name some.
        model: its name.

    Raises:
        InvalidOption: the message says which layer and why.
    """
    if missing := [layer for layer in layers if layer not in known]:
        names = ", ".join(map(_name, known))
        raise InvalidOption(f"{model} explains no layer {_name(missing[0])}; there are {names}")
    if len(set(layers)) < len(layers):
        raise InvalidOption("layers has a layer twice")
    if len(layers) > MOST_LAYERS:
        raise InvalidOption(
            f"layers has {len(layers)} layers; at most {MOST_LAYERS} are explained at once"
        )


def wanted(options: AttentionOptions, seen: Seen) -> tuple[Wanted, Cells]:
    """What the device is to compute for an image: of which layers, and whose attention.

    Raises:
        InvalidOption: a query lies outside of the image.
    """
    layers = _chosen(options, seen.config)
    height, width = seen.image_size
    queries = options.queries or ((width / 2, height / 2),)
    if queries == "auto":
        chosen = tuple(-1 - rank for rank in range(CHOSEN_QUERIES))
        cells: Cells = (_filled(chosen),) * len(layers)
    else:
        for x, y in queries:
            if not (0 <= x <= width and 0 <= y <= height):
                raise InvalidOption(
                    f"the query at {x:g}, {y:g} lies outside of the image, which has "
                    f"{width}x{height} pixels"
                )
        positions = seen.pixel_map.to_input(queries)
        geometry = _geometry(seen.config, seen.input_size)
        cells = tuple(
            _filled(geometry[layer].nearest_cells(positions, seen.resized).tolist())
            for layer in layers
        )
    return Wanted(points=has_points(seen.config), attention=layers), cells


def explained(
    options: AttentionOptions,
    seen: Seen,
    attention: Sequence[LayerAttention],
    points: Sequence[LayerPoints],
) -> tuple[AttendedLayer, ...]:
    """What the queries of a request attend to.

    Args:
        options: of the request.
        seen: the image.
        attention: what the device said, for each layer in their order in the network.
        points: of every deformable layer; of a Swin none.

    Returns:
        One entry for each layer, in that order.
    """
    geometry = _geometry(seen.config, seen.input_size)
    answers = []
    for index, of_layer in zip(_chosen(options, seen.config), attention, strict=True):
        layer = geometry[index]
        if isinstance(layer, WindowLayer):
            # All heads read the same cells.
            of_all = layer.key_points(seen.pixel_map)
            points_xy = np.broadcast_to(of_all, (len(of_layer.received), *of_all.shape))
        else:
            points_xy = points[index].sampling_locations
        answers.append(_layer(options, seen, of_layer, layer, points_xy))
    return tuple(answers)


def _layer(
    options: AttentionOptions,
    seen: Seen,
    attention: LayerAttention,
    layer: PointLayer | WindowLayer,
    points_xy: NDArray[np.float32],
) -> AttendedLayer:
    groups, rows, columns, _ = points_xy.shape
    keys_xy = points_xy.reshape(groups, -1, 2)
    return AttendedLayer(
        layer.stage,
        layer.block,
        attention.received.reshape(groups, rows, columns),
        tuple(
            _query(cell, attention.weights[index], options, seen=seen, layer=layer, keys_xy=keys_xy)
            for index, cell in _cells(options, seen, attention, layer)
        ),
    )


def _cells(
    options: AttentionOptions,
    seen: Seen,
    attention: LayerAttention,
    layer: PointLayer | WindowLayer,
) -> Iterator[tuple[int, tuple[int, int]]]:
    """The queries that an answer has, by their index, with `(row, column)` of their cells."""
    width, _ = layer.map_size
    cells = [divmod(cell, width) for cell in attention.cells.tolist()]
    if options.queries != "auto":
        yield from enumerate(cells[: len(options.queries or ((),))])
        return
    rows, columns = layer.cells_within(seen.resized)
    for index, (row, column) in enumerate(cells[:CHOSEN_QUERIES]):
        # A small part of a map may have fewer cells than are chosen.
        if row < rows and column < columns:
            yield index, (row, column)


def _query(
    cell: tuple[int, int],
    weights: NDArray[np.float32],
    options: AttentionOptions,
    *,
    seen: Seen,
    layer: PointLayer | WindowLayer,
    keys_xy: NDArray[np.float32],
) -> AttendedQuery:
    """What one query attends to, from the weights `(G, Ns)` and the points `(G, Ns, 2)`."""
    keys = np.arange(weights.shape[1], dtype=np.int64)
    window = cell_size = None
    if isinstance(layer, WindowLayer):
        keys = layer.keys_seen(cell)
        weights, keys_xy = weights[:, keys], keys_xy[:, keys]
        window, cell_size = layer.window(cell, seen.pixel_map), layer.cell_size(seen.pixel_map)
    count = min(options.top_n or DEFAULT_KEYS, len(keys))
    of_groups = _best(weights, count)
    of_all = weights.sum(0)
    best = _best(of_all, count)
    return AttendedQuery(
        cell,
        layer.centre(cell, seen.pixel_map),
        keys[of_groups],
        np.take_along_axis(weights, of_groups, 1),
        np.take_along_axis(keys_xy, of_groups[..., None], 1),
        keys[best],
        of_all[best],
        keys_xy[:, best].swapaxes(0, 1),
        window,
        cell_size,
    )


def _best(weights: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The keys that count the most along the last axis; of equal ones the first."""
    order: NDArray[np.int64] = np.argsort(-weights, axis=-1, kind="stable")
    return order[..., :count]


def _filled(cells: Sequence[int]) -> tuple[int, ...]:
    return (*cells, *(0,) * (MOST_QUERIES - len(cells)))


def has_points(config: Config) -> bool:
    """Whether a model says where it samples."""
    return isinstance(config, DatConfig)


def _geometry(
    config: Config, input_size: tuple[int, int]
) -> tuple[PointLayer, ...] | tuple[WindowLayer, ...]:
    """Of the layers of a model, in the order of the engine's output."""
    if isinstance(config, SwinConfig):
        return window_layers(config)
    return point_layers(config, input_size)


def explained_layers(config: Config) -> dict[Layer, int]:
    """The layers that are explained, with their index in the order of the engine.

    Of a DAT those whose queries share their keys, among all deformable layers.
    """
    layers = [(layer.stage, layer.block) for layer in _geometry(config, config.image_size)]
    return {
        (stage, block): index
        for index, (stage, block) in enumerate(layers)
        if isinstance(config, SwinConfig) or config.stages[stage].blocks[block] == "D"
    }


def _chosen(options: AttentionOptions, config: Config) -> tuple[int, ...]:
    """The index of each layer that is explained, ascending."""
    known = explained_layers(config)
    last = {stage: index for (stage, _), index in known.items()}
    chosen = [known[layer] for layer in options.layers] or list(last.values())[-2:]
    return tuple(sorted(chosen))


def _name(layer: Layer) -> str:
    stage, block = layer
    return f"{stage}.{block}"
