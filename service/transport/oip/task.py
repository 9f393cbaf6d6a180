"""How a task looks as tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from service.tasks.core import AnyCore, TaskAnswer, TaskOptions
from service.transport.oip.parameters import Parameters
from service.transport.oip.tensors import Values


@dataclass(frozen=True)
class TensorFacts:
    """A tensor as the metadata of a model name it.

    Attributes:
        name: of the input or output.
        datatype: one of `tensors.DATATYPES`.
        shape: the first dimension is the batch; -1 is any size.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        parameters: of the request.
        outputs: the names of all outputs that it wants.
    """

    parameters: Parameters
    outputs: frozenset[str]


@dataclass(frozen=True)
class OipTask(Generic[TaskOptions, TaskAnswer]):
    """How the models of a task look as tensors.

    Inputs, and the outputs that say where a model looked, are those of all tasks.

    Attributes:
        name: of the task.
        outputs: of a model; a request that names none wants all of them.
        options: of the core, from what is asked and from the options that every task has.
        values: the outputs that are asked for and perhaps others, by name, of the answers for the
            images of one request; the first axis is the image.
        ranked: the outputs `(images, classes)` whose best classes can be asked for.
        properties: what the metadata of its models says in words, by name.
    """

    name: str
    outputs: Callable[[AnyCore], Sequence[TensorFacts]]
    options: Callable[[Asked, dict[str, Any]], TaskOptions]
    values: Callable[[AnyCore, Sequence[TaskAnswer], Asked], Mapping[str, Values]]
    ranked: frozenset[str] = frozenset()
    properties: Mapping[str, str] = field(default_factory=dict)
