"""Detection as tensors, in which an image with fewer objects is filled up to the most."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from service.errors import InvalidOption, quoted
from service.settings import ResizeMode
from service.tasks.core import AnyCore
from service.tasks.detection import DetectedImage, Detection, DetectionCore, DetectOptions
from service.tasks.masks import RunLengths
from service.transport.oip.task import Asked, OipTask, TensorFacts
from service.transport.oip.tensors import BYTES, Values, of_elements

_RESIZE_MODES = ("official", "letterbox")


def _outputs(core: AnyCore) -> Sequence[TensorFacts]:
    facts = (
        TensorFacts("count", "INT32", (-1,)),
        TensorFacts("boxes", "FP32", (-1, -1, 4)),
        TensorFacts("scores", "FP32", (-1, -1)),
        TensorFacts("classes", "INT32", (-1, -1)),
        TensorFacts("labels", BYTES, (-1, -1)),
    )
    assert isinstance(core, DetectionCore)
    return (*facts, TensorFacts("masks", BYTES, (-1, -1))) if core.has_masks else facts


def _options(asked: Asked, every_task: dict[str, Any]) -> DetectOptions:
    parameters = asked.parameters
    mode = parameters.text("resize_mode")
    if mode is not None and mode not in _RESIZE_MODES:
        raise InvalidOption(
            f"the parameter resize_mode is one of {', '.join(_RESIZE_MODES)}, not {quoted(mode)}"
        )
    given: dict[str, Any] = {
        "score_threshold": parameters.number("score_threshold"),
        "max_detections": parameters.count("max_detections"),
    }
    classes = parameters.text("classes")
    return DetectOptions(
        **every_task,
        classes=tuple(classes.split(",")) if classes else (),
        masks="rle" if "masks" in asked.outputs else "none",
        resize_mode=cast("ResizeMode | None", mode),
        **{name: value for name, value in given.items() if value is not None},
    )


def _values(_core: AnyCore, answers: Sequence[DetectedImage], asked: Asked) -> Mapping[str, Values]:
    found = [answer.detections for answer in answers]
    shape = (len(found), max(map(len, found)))
    boxes, scores = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.float32)
    classes = np.full(shape, -1, np.int32)
    for index, detections in enumerate(found):
        end = len(detections)
        if end:
            boxes[index, :end] = [one.box for one in detections]
            scores[index, :end] = [one.score for one in detections]
            classes[index, :end] = [one.index for one in detections]
    given: dict[str, Values] = {
        "count": np.array([len(detections) for detections in found], np.int32),
        "boxes": boxes,
        "scores": scores,
        "classes": classes,
        "labels": _filled([[one.label.encode() for one in row] for row in found], shape),
    }
    if "masks" in asked.outputs:
        given["masks"] = _filled([[_mask(one) for one in row] for row in found], shape)
    return given


def _filled(rows: Sequence[Sequence[bytes]], shape: tuple[int, int]) -> Values:
    _, most = shape
    elements = [one for row in rows for one in (*row, *(b"",) * (most - len(row)))]
    return of_elements(elements, shape)


def _mask(found: Detection) -> bytes:
    """COCO's run lengths of a mask, as the JSON that pycocotools reads."""
    assert isinstance(found.mask, RunLengths), "it was asked for"
    return json.dumps({"size": found.mask.image_size, "counts": found.mask.counts}).encode()


OIP_DETECT = OipTask(
    "detect",
    _outputs,
    _options,
    _values,
    properties={
        "boxes": "x1, y1, x2, y2 in pixels of the image, best first; filled up to the most of all "
        "images with zeros, with the class -1 and with empty texts",
        "masks": "JSON of COCO's run lengths, as pycocotools reads them",
    },
)
