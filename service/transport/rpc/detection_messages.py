"""The messages of detection."""

from typing import Any, Literal

from service.errors import InvalidOption
from service.pb import dat_pb2
from service.tasks.detection import DetectedImage, Detection, DetectOptions, PointsInside
from service.tasks.masks import EncodedMask, MaskFormat, PngMask, Polygons, RunLengths
from service.transport.rpc.messages import (
    RESIZE_MODES,
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
