"""The messages of detection."""

from typing import Literal

from service.errors import InvalidOption
from service.pb import dat_pb2
from service.tasks.detection import DetectedImage, Detection, DetectOptions, PointsInside
from service.tasks.masks import MaskFormat
from service.transport.rpc.masks_messages import mask_message
from service.transport.rpc.messages import (
    RESIZE_MODES,
    box_message,
    of_every_task,
    options_of_every_task,
    resize_mode_of,
)
from service.transport.rpc.task import RpcTask

_MASKS: dict[int, MaskFormat | Literal["none"] | None] = {
    dat_pb2.MASK_FORMAT_UNSPECIFIED: None,
    dat_pb2.MASK_FORMAT_NONE: "none",
    dat_pb2.MASK_FORMAT_RLE: "rle",
    dat_pb2.MASK_FORMAT_POLYGON: "polygon",
    dat_pb2.MASK_FORMAT_PNG: "png",
}


def _options(request: dat_pb2.DetectRequest, remaining_s: float | None) -> DetectOptions:
    if request.masks not in _MASKS:
        raise InvalidOption(f"masks has no value {request.masks}")
    given = {
        name: getattr(request, name)
        for name in ("score_threshold", "max_detections")
        if request.HasField(name)
    }
    return DetectOptions(
        **options_of_every_task(request, remaining_s),
        classes=tuple(request.classes),
        masks=_MASKS[request.masks],
        resize_mode=resize_mode_of(request.resize_mode),
        **given,
    )


def _show(answer: DetectedImage) -> dict[str, dat_pb2.DetectedImage]:
    input_height, input_width = answer.input_size
    return {
        "image": dat_pb2.DetectedImage(
            detections=map(_detection, answer.detections),
            input_width=input_width,
            input_height=input_height,
            resize_mode=RESIZE_MODES[answer.resize_mode],
            **of_every_task(answer),
        )
    }


def _detection(found: Detection) -> dat_pb2.Detection:
    return dat_pb2.Detection(
        label=found.label,
        index=found.index,
        score=found.score,
        box=box_message(found.box),
        points_inside=map(_points_inside, found.points_inside or ()),
        **mask_message(found.mask),
    )


def _points_inside(inside: PointsInside) -> dat_pb2.PointsInside:
    return dat_pb2.PointsInside(
        stage=inside.stage, block=inside.block, indices=inside.indices.tolist()
    )


RPC_DETECT = RpcTask(
    "detect",
    "dat.v1.DetectorService",
    "Detect",
    dat_pb2.DetectRequest,
    _options,
    dat_pb2.DetectResponse,
    dat_pb2.DetectResult,
    _show,
    dat_pb2.DetectStreamRequest,
    dat_pb2.DetectStreamResponse,
)
