"""What the messages of all tasks have in common."""

from collections.abc import Sequence
from typing import Any

from service.errors import InvalidOption, ServiceError
from service.models.card import Label
from service.pb import dat_pb2
from service.priority import Priority
from service.settings.model import ResizeMode
from service.tasks.attention import AttendedLayer, AttendedQuery, AttentionOptions, Queries
from service.tasks.core import Answer, Explain
from service.tasks.passage import Timing
from service.tasks.points import LayerPoints
from service.tasks.windows import Box

_EXPLAIN: dict[int, Explain] = {
    dat_pb2.EXPLAIN_UNSPECIFIED: "none",
    dat_pb2.EXPLAIN_NONE: "none",
    dat_pb2.EXPLAIN_POINTS: "points",
    dat_pb2.EXPLAIN_OBJECTS: "objects",
    dat_pb2.EXPLAIN_ATTENTION: "attention",
}
RESIZE_MODES: dict[ResizeMode | None, dat_pb2.ResizeMode] = {
    None: dat_pb2.RESIZE_MODE_UNSPECIFIED,
    "official": dat_pb2.RESIZE_MODE_OFFICIAL,
    "letterbox": dat_pb2.RESIZE_MODE_LETTERBOX,
}
_RESIZE_MODES = {int(value): mode for mode, value in RESIZE_MODES.items()}

_PRIORITIES: dict[int, Priority] = {
    dat_pb2.PRIORITY_UNSPECIFIED: "high",
    dat_pb2.PRIORITY_HIGH: "high",
    dat_pb2.PRIORITY_LOW: "low",
}


def options_of_every_task(request: Any, remaining_s: float | None) -> dict[str, Any]:
    """What every task's options of the core have of a request, and the seconds left for it.

    Raises:
        InvalidOption: an enumeration has no such value, or queries are both named and left to
            the model.
    """
    return {"explain": _explain_of(request.explain)} | common_options(request, remaining_s)


def common_options(request: Any, remaining_s: float | None) -> dict[str, Any]:
    """What the options of the core have of every request for images.

    Raises:
        InvalidOption: as above.
    """
    return {
        "model": request.model or None,
        "attention": _attention_of(request.attention),
        "timeout_s": remaining_s,
        "priority": _priority_of(request.priority),
    }


def _explain_of(value: int) -> Explain:
    explain = _EXPLAIN.get(value)
    if explain is None:
        raise InvalidOption(f"explain has no value {value}")
    return explain


def _attention_of(options: dat_pb2.AttentionOptions) -> AttentionOptions:
    given: Queries = tuple((query.x, query.y) for query in options.queries)
    if options.auto and given:
        raise InvalidOption("attention has both auto and queries; give one of them")
    return AttentionOptions(
        queries="auto" if options.auto else given or None,
        layers=tuple((layer.stage, layer.block) for layer in options.layers),
        top_n=options.top_n if options.HasField("top_n") else None,
    )


def _priority_of(value: int) -> Priority:
    priority = _PRIORITIES.get(value)
    if priority is None:
        raise InvalidOption(f"priority has no value {value}")
    return priority


def resize_mode_of(value: int) -> ResizeMode | None:
    """A way to resize; `None` means that of the model.

    Raises:
        InvalidOption: the enumeration has no such value.
    """
    if value not in _RESIZE_MODES:
        raise InvalidOption(f"resize_mode has no value {value}")
    return _RESIZE_MODES[value]


def error_message(error: ServiceError) -> dat_pb2.Error:
    """The message of a failure."""
    return dat_pb2.Error(code=error.code, message=str(error), grpc_code=error.grpc_code.value[0])


def of_every_task(answer: Answer) -> dict[str, Any]:
    """What every task says of an image, by the fields that its messages share.

    Those of a task without attention need no field for it.
    """
    fields: dict[str, Any] = {
        "width": answer.width,
        "height": answer.height,
        "points": _points(answer.points),
        "timing": timing_message(answer.timing),
    }
    if answer.attention is not None:
        fields["attention"] = _attention(answer.attention)
    return fields


def timing_message(timing: Timing) -> dat_pb2.Timing:
    """The message of where the time of an image went."""
    return dat_pb2.Timing(**vars(timing))


def _points(layers: Sequence[LayerPoints] | None) -> dat_pb2.Points | None:
    return None if layers is None else dat_pb2.Points(layers=map(_layer, layers))


def _layer(layer: LayerPoints) -> dat_pb2.DeformableLayer:
    groups, rows, columns, _ = layer.sampling_locations.shape
    return dat_pb2.DeformableLayer(
        stage=layer.stage,
        block=layer.block,
        groups=groups,
        rows=rows,
        columns=columns,
        sampling_locations=layer.sampling_locations.ravel().tolist(),
        reference_points=layer.reference_points.ravel().tolist(),
    )


def _attention(layers: Sequence[AttendedLayer]) -> dat_pb2.Attention:
    return dat_pb2.Attention(layers=map(_attended_layer, layers))


def _attended_layer(layer: AttendedLayer) -> dat_pb2.AttentionLayer:
    groups, rows, columns = layer.received.shape
    return dat_pb2.AttentionLayer(
        stage=layer.stage,
        block=layer.block,
        groups=groups,
        rows=rows,
        columns=columns,
        received=layer.received.ravel().tolist(),
        queries=map(_attended_query, layer.queries),
    )


def _attended_query(query: AttendedQuery) -> dat_pb2.AttentionQuery:
    row, column = query.cell
    x, y = query.centre
    return dat_pb2.AttentionQuery(
        row=row,
        column=column,
        centre=dat_pb2.Position(x=x, y=y),
        group_keys=query.group_keys.ravel().tolist(),
        group_weights=query.group_weights.ravel().tolist(),
        group_points=query.group_points.ravel().tolist(),
        keys=query.keys.tolist(),
        weights=query.weights.tolist(),
        points=query.points.ravel().tolist(),
        window=None if query.window is None else box_message(query.window),
    )


def box_message(box: Box) -> dat_pb2.Box:
    """The message of a box."""
    x1, y1, x2, y2 = box
    return dat_pb2.Box(x1=x1, y1=y1, x2=x2, y2=y2)


def colour_message(colour: tuple[int, int, int]) -> dat_pb2.Colour:
    """The message of an RGB colour."""
    red, green, blue = colour
    return dat_pb2.Colour(red=red, green=green, blue=blue)


def label_message(label: Label) -> dat_pb2.Label:
    """The message of a class of a model."""
    colour = None if label.colour is None else colour_message(label.colour)
    return dat_pb2.Label(name=label.name, wnid=label.wnid, colour=colour)
