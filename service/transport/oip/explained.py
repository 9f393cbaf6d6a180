"""Where a model looked, as tensors: `points.<stage>.<block>` and `attention.<stage>.<block>.…`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from service.errors import InvalidOption, quoted
from service.tasks.attention import (
    AttendedLayer,
    AttendedQuery,
    AttentionOptions,
    Layer,
    explained_layers,
    has_points,
)
from service.tasks.core import Answer, AnyCore, Explain
from service.tasks.pictures import PicturedCore
from service.tasks.points import LayerPoints, point_layers
from service.transport.attention_text import read_layer, read_queries
from service.transport.oip.batches import stacked
from service.transport.oip.parameters import Parameters
from service.transport.oip.tensors import Values

_POINTS = ("points", "reference_points")
_ATTENTION = "attention"
_EXPLANATIONS = tuple(one for one in get_args(Explain) if one != "objects")

# What is said of each query, beside `received`, which is said of all together.
_OF_QUERY: Mapping[str, Callable[[AttendedQuery], Any]] = {
    "centres": lambda query: np.array(query.centre, np.float32),
    "keys": lambda query: query.keys,
    "weights": lambda query: query.weights,
    "points": lambda query: query.points,
    "group_keys": lambda query: query.group_keys,
    "group_weights": lambda query: query.group_weights,
    "group_points": lambda query: query.group_points,
}


def options(parameters: Parameters, outputs: Sequence[str]) -> dict[str, Any]:
    """What the options of every task have of a request: by its parameters, and by its outputs.

    Raises:
        InvalidOption: a parameter that says what cannot be asked for.
    """
    explain = parameters.text("explain")
    if explain is not None and explain not in _EXPLANATIONS:
        raise InvalidOption(
            f"the parameter explain is one of {', '.join(_EXPLANATIONS)}, not {quoted(explain)}"
        )
    named = [_layer_of(name) for name in outputs if _is_of_attention(name)]
    if named:
        explain = "attention"
    elif any(name.startswith(tuple(f"{kind}." for kind in _POINTS)) for name in outputs):
        explain = explain if explain == "attention" else "points"
    layers = parameters.text("layers")
    chosen = [read_layer(layer) for layer in layers.split(",")] if layers else []
    chosen += [layer for layer in dict.fromkeys(named) if layer is not None and layer not in chosen]
    attention = AttentionOptions(
        queries=read_queries(parameters.text("queries")),
        layers=tuple(chosen),
        top_n=parameters.count("top_n"),
    )
    return {"explain": explain or "none", "attention": attention}


def output_names(core: AnyCore) -> Iterator[str]:
    """All outputs that a model has beside those of its task."""
    if not isinstance(core, PicturedCore):
        return
    network = core.network
    if has_points(network):
        for layer in point_layers(network, network.image_size):
            for kind in _POINTS:
                yield f"{kind}.{layer.stage}.{layer.block}"
    for stage, block in explained_layers(network):
        for what in ("received", *_OF_QUERY):
            yield f"{_ATTENTION}.{stage}.{block}.{what}"


def described(core: AnyCore) -> Mapping[str, str]:
    """The same in words, by the first part of their names."""
    layers: dict[str, dict[str, None]] = {}
    for name in output_names(core):
        kind, stage, block, *_ = name.split(".")
        layers.setdefault(kind, {})[f"{stage}.{block}"] = None
    return {
        f"{kind}_layers": ", ".join(of_kind)
        for kind, of_kind in layers.items()
        if kind != _POINTS[1]
    }


def values(answers: Sequence[Answer]) -> Mapping[str, Values]:
    """The outputs of the answers for the images of one request.

    Raises:
        InvalidOption: they differ in shape from image to image.
    """
    given: dict[str, list[Values]] = {}
    for answer in answers:
        for layer in answer.points or ():
            for name, value in _of_points(layer):
                given.setdefault(name, []).append(value)
        for attended in answer.attention or ():
            for name, value in _of_attention(attended):
                given.setdefault(name, []).append(value)
    return {name: stacked(name, found) for name, found in given.items()}


def _of_points(layer: LayerPoints) -> Iterator[tuple[str, Values]]:
    where = f"{layer.stage}.{layer.block}"
    yield f"points.{where}", layer.sampling_locations
    yield f"reference_points.{where}", layer.reference_points


def _of_attention(layer: AttendedLayer) -> Iterator[tuple[str, Values]]:
    where = f"{_ATTENTION}.{layer.stage}.{layer.block}"
    yield f"{where}.received", layer.received
    for what, take in _OF_QUERY.items():
        yield f"{where}.{what}", np.stack([take(query) for query in layer.queries])


def _is_of_attention(name: str) -> bool:
    return name.startswith(f"{_ATTENTION}.")


def _layer_of(name: str) -> Layer | None:
    parts = name.split(".")
    if len(parts) != 4:
        return None
    try:
        return read_layer(f"{parts[1]}.{parts[2]}")
    except InvalidOption:  # no output has such a name, which is said elsewhere
        return None
