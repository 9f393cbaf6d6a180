"""What the messages of all tasks have in common."""

from collections.abc import Sequence
from typing import Any

from service.errors import InvalidOption, ServiceError
from service.pb import dat_pb2
from service.priority import Priority
from service.settings import ResizeMode
from service.tasks.core import Answer, Explain
from service.tasks.passage import Timing
from service.tasks.points import LayerPoints

_EXPLAIN: dict[int, Explain] = {
    dat_pb2.EXPLAIN_UNSPECIFIED: "none",
    dat_pb2.EXPLAIN_NONE: "none",
    dat_pb2.EXPLAIN_POINTS: "points",
    dat_pb2.EXPLAIN_OBJECTS: "objects",
}
RESIZE_MODES: dict[ResizeMode | None, dat_pb2.ResizeMode] = {
    None: dat_pb2.RESIZE_MODE_UNSPECIFIED,
    "official": dat_pb2.RESIZE_MODE_OFFICIAL,
    "letterbox": dat_pb2.RESIZE_MODE_LETTERBOX,
}

_PRIORITIES: dict[int, Priority] = {
    dat_pb2.PRIORITY_UNSPECIFIED: "high",
    dat_pb2.PRIORITY_HIGH: "high",
    dat_pb2.PRIORITY_LOW: "low",
}


def options_of_every_task(request: Any, remaining_s: float | None) -> dict[str, Any]:
    """What every task's options of the core have of a request, and the seconds left for it.

    Raises:
        InvalidOption: an enumeration has no such value.
    """
    return {
        "model": request.model or None,
        "explain": _explain_of(request.explain),
        "timeout_s": remaining_s,
        "priority": _priority_of(request.priority),
    }


def _explain_of(value: int) -> Explain:
    explain = _EXPLAIN.get(value)
    if explain is None:
        raise InvalidOption(f"explain has no value {value}")
    return explain


def _priority_of(value: int) -> Priority:
    priority = _PRIORITIES.get(value)
    if priority is None:
        raise InvalidOption(f"priority has no value {value}")
    return priority


def error_message(error: ServiceError) -> dat_pb2.Error:
    """The message of a failure."""
    return dat_pb2.Error(code=error.code, message=str(error), grpc_code=error.grpc_code.value[0])


def of_every_task(answer: Answer) -> dict[str, Any]:
    """What every task says of an image, by the fields that its messages share."""
    return {
        "width": answer.width,
        "height": answer.height,
        "points": _points(answer.points),
        "timing": _timing(answer.timing),
    }


def _timing(timing: Timing) -> dat_pb2.Timing:
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
