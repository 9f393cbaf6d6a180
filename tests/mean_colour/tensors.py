"""The task as tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.tasks.core import AnyCore
from service.transport.oip.task import Asked, OipTask, TensorFacts
from service.transport.oip.tensors import Values
from tests.mean_colour.core import MeanColour, MeanColourOptions


def _outputs(_: AnyCore) -> Sequence[TensorFacts]:
    return (TensorFacts("colour", "FP32", (-1, 3)),)


def _options(asked: Asked, every_task: dict[str, Any]) -> MeanColourOptions:
    inverted = asked.parameters.flag("inverted")
    return MeanColourOptions(**every_task, inverted=bool(inverted))


def _values(_: AnyCore, answers: Sequence[MeanColour], __: Asked) -> Mapping[str, Values]:
    return {"colour": np.array([answer.colour for answer in answers], np.float32)}


OIP_MEAN_COLOUR = OipTask("mean-colour", _outputs, _options, _values)
