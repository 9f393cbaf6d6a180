"""Segmentation as tensors: label maps of images of one size, and what share each class has."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from service.errors import InvalidOption, quoted
from service.tasks.core import AnyCore
from service.tasks.segmentation import SegmentedImage, SegmentOptions, TestTime
from service.transport.oip.task import Asked, OipTask, TensorFacts
from service.transport.oip.tensors import Values

_TEST_TIMES = ("official", "official_ms")


def _outputs(core: AnyCore) -> Sequence[TensorFacts]:
    classes = core.card.classes
    return (
        TensorFacts("label_map", "UINT16", (-1, -1, -1)),
        TensorFacts("shares", "FP32", (-1, classes)),
        TensorFacts("confidence", "UINT8", (-1, -1, -1)),
    )


def _options(asked: Asked, every_task: dict[str, Any]) -> SegmentOptions:
    parameters = asked.parameters
    test_time = parameters.text("test_time")
    if test_time is not None and test_time not in _TEST_TIMES:
        raise InvalidOption(
            f"the parameter test_time is one of {', '.join(_TEST_TIMES)}, not {quoted(test_time)}"
        )
    given: dict[str, Any] = {
        "test_time": cast("TestTime | None", test_time),
        "min_share": parameters.number("min_share"),
    }
    classes = parameters.text("classes")
    return SegmentOptions(
        **every_task,
        encoded=False,
        classes=tuple(classes.split(",")) if classes else (),
        confidence="confidence" in asked.outputs,
        **{name: value for name, value in given.items() if value is not None},
    )


def _values(core: AnyCore, answers: Sequence[SegmentedImage], asked: Asked) -> Mapping[str, Values]:
    sizes = {answer.labels.shape for answer in answers}
    if len(sizes) > 1 and not asked.outputs.isdisjoint(("label_map", "confidence")):
        first, second, *_ = (f"{width} x {height}" for height, width in sorted(sizes))
        raise InvalidOption(
            f"the label maps of one request are one tensor, and these images have several sizes "
            f"({first} and {second} pixels): send images of one size, or one in each request"
        )
    shares = np.zeros((len(answers), core.card.classes), np.float32)
    for row, answer in zip(shares, answers, strict=True):
        row[[one.index for one in answer.segments]] = [one.share for one in answer.segments]
    given: dict[str, Values] = {"shares": shares}
    if "label_map" in asked.outputs:
        given["label_map"] = np.stack([answer.labels for answer in answers]).astype(np.uint16)
    if "confidence" in asked.outputs:
        margins = [answer.margins for answer in answers if answer.margins is not None]
        given["confidence"] = np.stack(margins)
    return given


OIP_SEGMENT = OipTask(
    "segment",
    _outputs,
    _options,
    _values,
    ranked=frozenset({"shares"}),
    properties={
        "label_map": "the index of each pixel's class, at the size of the image; the number of "
        "classes where the parameters classes and min_share leave the class out",
        "confidence": "255 times by how much the probability of the label is above the next",
    },
)
