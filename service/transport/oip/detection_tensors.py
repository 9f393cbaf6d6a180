"""Detection as tensors, in which an image with fewer objects is filled up to the most."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from service.errors import InvalidOption, quoted
from service.settings.model import ResizeMode
from service.tasks.core import AnyCore
from service.tasks.detection import DetectedImage, Detection, DetectionCore, DetectOptions
from service.tasks.masks import RunLengths
from service.transport.oip.batches import filled_up
from service.transport.oip.task import Asked, OipTask, TensorFacts
from service.transport.oip.tensors import BYTES, Values

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
    given: dict[str, Values] = {
        "count": np.array(list(map(len, found)), np.int32),
        "boxes": filled_up([[one.box for one in row] for row in found], "FP32", 0, (4,)),
        "scores": filled_up([[one.score for one in row] for row in found], "FP32", 0),
        "classes": filled_up([[one.index for one in row] for row in found], "INT32", -1),
        "labels": filled_up([[one.label.encode() for one in row] for row in found], BYTES, b""),
    }
    if "masks" in asked.outputs:
        given["masks"] = filled_up([list(map(_mask, row)) for row in found], BYTES, b"")
    return given


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
