"""gRPC messages to what the cores take, and what they say to messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from google.protobuf.message import Message

from service.errors import InvalidOption, ServiceError
from service.metrics import Task
from service.models.load import ModelCard
from service.pb import dat_pb2
from service.settings import ResizeMode
from service.tasks.classification import Classification, Classifier, ClassifyOptions
from service.tasks.core import Answer, Core, Explain, Options, Timing, show_each
from service.tasks.detection import (
    DetectedImage,
    Detection,
    DetectOptions,
    DetectorCore,
    PointsInside,
)
from service.tasks.masks import EncodedMask, MaskFormat, PngMask, Polygons, RunLengths
from service.tasks.points import LayerPoints

TaskOptions = TypeVar("TaskOptions", bound=Options)
TaskAnswer = TypeVar("TaskAnswer", bound=Answer)

_EXPLAIN: dict[int, Explain] = {
    dat_pb2.EXPLAIN_UNSPECIFIED: "none",
    dat_pb2.EXPLAIN_NONE: "none",
    dat_pb2.EXPLAIN_POINTS: "points",
    dat_pb2.EXPLAIN_OBJECTS: "objects",
}
_MASKS: dict[int, MaskFormat | Literal["none"] | None] = {
    dat_pb2.MASK_FORMAT_UNSPECIFIED: None,
    dat_pb2.MASK_FORMAT_NONE: "none",
    dat_pb2.MASK_FORMAT_RLE: "rle",
    dat_pb2.MASK_FORMAT_POLYGON: "polygon",
    dat_pb2.MASK_FORMAT_PNG: "png",
}
RESIZE_MODES: dict[ResizeMode | None, dat_pb2.ResizeMode] = {
    None: dat_pb2.RESIZE_MODE_UNSPECIFIED,
    "official": dat_pb2.RESIZE_MODE_OFFICIAL,
    "letterbox": dat_pb2.RESIZE_MODE_LETTERBOX,
}
_RESIZE_MODES = {int(value): mode for mode, value in RESIZE_MODES.items()}


@dataclass(frozen=True)
class RpcTask(Generic[TaskOptions, TaskAnswer]):
    """How a task looks over gRPC.

    Attributes:
        name: of the task.
        service: that has its calls; the one with several answers has the name of the other with
            `Stream` behind it.
        method: its call with one answer.
        core: what answers.
        request: the message that asks.
        options: of the core from a request without its images, and the seconds left for it.
        response: from what the core says.
        stream_request: the message of a stream that asks.
        stream_response: the message of a stream that answers.
    """

    name: Task
    service: str
    method: str
    core: type[Core[TaskOptions, Any, Any, Any, TaskAnswer]]
    request: type[Message]
    options: Callable[[Any, float | None], TaskOptions]
    response: Callable[[ModelCard, list[TaskAnswer | ServiceError]], Message]
    stream_request: type[dat_pb2.ClassifyStreamRequest | dat_pb2.DetectStreamRequest]
    stream_response: Callable[..., Message]


def _classify_options(
    request: dat_pb2.ClassifyRequest, remaining_s: float | None
) -> ClassifyOptions:
    return ClassifyOptions(
        model=request.model or None,
        explain=_explain(request.explain),
        timeout_s=remaining_s,
        top_k=request.top_k if request.HasField("top_k") else ClassifyOptions.top_k,
    )


def _explain(value: int) -> Explain:
    explain = _EXPLAIN.get(value)
    if explain is None:
        raise InvalidOption(f"explain has no value {value}")
    return explain


def _classify_response(
    card: ModelCard, outcomes: list[Classification | ServiceError]
) -> dat_pb2.ClassifyResponse:
    return dat_pb2.ClassifyResponse(
        model=card.name, version=card.version, results=show_each(outcomes, _result)
    )


def _detect_options(request: dat_pb2.DetectRequest, remaining_s: float | None) -> DetectOptions:
    if request.masks not in _MASKS:
        raise InvalidOption(f"masks has no value {request.masks}")
    if request.resize_mode not in _RESIZE_MODES:
        raise InvalidOption(f"resize_mode has no value {request.resize_mode}")
    given = {
        name: getattr(request, name)
        for name in ("score_threshold", "max_detections")
        if request.HasField(name)
    }
    return DetectOptions(
        model=request.model or None,
        explain=_explain(request.explain),
        timeout_s=remaining_s,
        classes=tuple(request.classes),
        masks=_MASKS[request.masks],
        resize_mode=_RESIZE_MODES[request.resize_mode],
        **given,
    )


def _detect_response(
    card: ModelCard, outcomes: list[DetectedImage | ServiceError]
) -> dat_pb2.DetectResponse:
    return dat_pb2.DetectResponse(
        model=card.name, version=card.version, results=show_each(outcomes, _detect_result)
    )


def _detect_result(outcome: DetectedImage | ServiceError) -> dat_pb2.DetectResult:
    if isinstance(outcome, ServiceError):
        return dat_pb2.DetectResult(error=error_message(outcome))
    input_height, input_width = outcome.input_size
    return dat_pb2.DetectResult(
        image=dat_pb2.DetectedImage(
            detections=map(_detection, outcome.detections),
            width=outcome.width,
            height=outcome.height,
            input_width=input_width,
            input_height=input_height,
            resize_mode=RESIZE_MODES[outcome.resize_mode],
            points=_points(outcome.points),
            timing=_timing(outcome.timing),
        )
    )


def _detection(found: Detection) -> dat_pb2.Detection:
    x1, y1, x2, y2 = found.box
    return dat_pb2.Detection(
        label=found.label,
        index=found.index,
        score=found.score,
        box=dat_pb2.Box(x1=x1, y1=y1, x2=x2, y2=y2),
        points_inside=map(_points_inside, found.points_inside or ()),
        **_mask(found.mask),
    )


def _mask(mask: EncodedMask | None) -> dict[str, Any]:
    """The field of the mask, by its name."""
    match mask:
        case RunLengths(image_size=(height, width), counts=counts):
            runs = dat_pb2.RunLengths(height=height, width=width, counts=counts)
            return {"rle": runs}
        case Polygons(rings=rings):
            points = (dat_pb2.Ring(points=ring.ravel().tolist()) for ring in rings)
            return {"polygon": dat_pb2.Polygons(rings=points)}
        case PngMask():
            return {"png": dat_pb2.PngMask(**vars(mask))}
    return {}


def _points_inside(inside: PointsInside) -> dat_pb2.PointsInside:
    return dat_pb2.PointsInside(
        stage=inside.stage, block=inside.block, indices=inside.indices.tolist()
    )


def error_message(error: ServiceError) -> dat_pb2.Error:
    """A failure."""
    return dat_pb2.Error(code=error.code, message=str(error), grpc_code=error.grpc_code.value[0])


def _result(outcome: Classification | ServiceError) -> dat_pb2.ImageResult:
    if isinstance(outcome, ServiceError):
        return dat_pb2.ImageResult(error=error_message(outcome))
    return dat_pb2.ImageResult(
        classification=dat_pb2.Classification(
            predictions=[dat_pb2.Prediction(**vars(p)) for p in outcome.predictions],
            width=outcome.width,
            height=outcome.height,
            points=_points(outcome.points),
            timing=_timing(outcome.timing),
        )
    )


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


CLASSIFY = RpcTask(
    "classify",
    "dat.v1.ClassifierService",
    "Classify",
    Classifier,
    dat_pb2.ClassifyRequest,
    _classify_options,
    _classify_response,
    dat_pb2.ClassifyStreamRequest,
    dat_pb2.ClassifyStreamResponse,
)
DETECT = RpcTask(
    "detect",
    "dat.v1.DetectorService",
    "Detect",
    DetectorCore,
    dat_pb2.DetectRequest,
    _detect_options,
    _detect_response,
    dat_pb2.DetectStreamRequest,
    dat_pb2.DetectStreamResponse,
)
