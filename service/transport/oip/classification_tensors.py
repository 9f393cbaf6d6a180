"""Classification as tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.tasks.classification import Classification, ClassifyOptions
from service.tasks.core import AnyCore
from service.transport.oip.ranking import best
from service.transport.oip.task import Asked, OipTask, TensorFacts
from service.transport.oip.tensors import BYTES, Values


def _outputs(core: AnyCore) -> Sequence[TensorFacts]:
    classes = core.card.classes
    return (
        TensorFacts("logits", "FP32", (-1, classes)),
        TensorFacts("probabilities", "FP32", (-1, classes)),
        TensorFacts("labels", BYTES, (-1, -1)),
    )


def _options(asked: Asked, every_task: dict[str, Any]) -> ClassifyOptions:
    top_k = asked.parameters.count("top_k")
    return ClassifyOptions(
        **every_task,
        top_k=ClassifyOptions.top_k if top_k is None else top_k,
        logits="logits" in asked.outputs,
    )


def _values(core: AnyCore, answers: Sequence[Classification], asked: Asked) -> Mapping[str, Values]:
    probabilities = np.empty((len(answers), core.card.classes), np.float32)
    for row, answer in zip(probabilities, answers, strict=True):
        row[answer.classes] = answer.scores
    given: dict[str, Values] = {"probabilities": probabilities}
    if "logits" in asked.outputs:
        given["logits"] = np.stack([_logits(answer) for answer in answers])
    if "labels" in asked.outputs:
        given["labels"] = best(probabilities, len(answers[0].predictions), core.labels)
    return given


def _logits(answer: Classification) -> NDArray[np.float32]:
    assert answer.logits is not None, "they were asked for"
    return answer.logits


OIP_CLASSIFY = OipTask(
    "classify", _outputs, _options, _values, frozenset({"logits", "probabilities"})
)
