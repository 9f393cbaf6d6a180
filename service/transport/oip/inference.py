"""From a request with tensors to the task of its model, and from the answers back to tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.errors import (
    EngineUnavailable,
    InvalidRequest,
    NotReady,
    ServiceError,
    UnknownModel,
    quoted,
)
from service.lifecycle import Lifecycle
from service.priority import Priority
from service.settings.limits import Limits
from service.tasks.catalogue import Catalogue
from service.tasks.core import Answer, AnyCore, Options, Upload
from service.transport import priority
from service.transport.oip import explained
from service.transport.oip.images import inputs_of, read_images
from service.transport.oip.parameters import Parameters
from service.transport.oip.placed import read_inputs, write_outputs
from service.transport.oip.ranking import best
from service.transport.oip.shared_memory import SharedMemory
from service.transport.oip.task import Asked, OipTask, TensorFacts
from service.transport.oip.tensors import BYTES, DTYPES, Input, Tensor, Values

NAME = "dat-serve"
# Of the protocol: what is served beside what every server has.
EXTENSIONS = ("binary_tensor_data", "classification", "parameters")
PLATFORM = "pytorch_dat"


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request names.

    Attributes:
        name: of the output.
        parameters: of it.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InferRequest:
    """A request as both transports read it.

    Attributes:
        id: that comes back with the answer; empty where the caller gave none, who then gets the
            one of the transport.
        parameters: of the request.
        inputs: its tensors.
        outputs: those that are wanted; none means all of the model's metadata.
    """

    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[Input]
    outputs: Sequence[RequestedOutput]


@dataclass(frozen=True)
class Understood:
    """A request for one model, of which all is read.

    Attributes:
        uploads: its images.
        options: of the core.
        asked: what was asked for.
        outputs: that are wanted, in the order of the answer.
        owner: of the shared memory that the request may name.
        copied: bytes of its inputs that were copied from there.
    """

    uploads: Sequence[Upload]
    options: Options
    asked: Asked
    outputs: Sequence[RequestedOutput]
    owner: str
    copied: int


@dataclass(frozen=True)
class ModelMetadata:
    """What the protocol says of a model.

    Attributes:
        properties: words about it.
    """

    name: str
    versions: Sequence[str]
    platform: str
    inputs: Sequence[TensorFacts]
    outputs: Sequence[TensorFacts]
    properties: Mapping[str, str]


class Inference:
    """The models as the protocol sees them.

    Args:
        tasks: how they look as tensors.
        catalogue: the models.
        lifecycle: of the replica.
        limits: of a request.

    Attributes:
        catalogue: as given.
        extensions: of the protocol, that are served.
        memory: where tensors may lie beside requests and answers.
    """

    extensions: Sequence[str] = EXTENSIONS

    def __init__(
        self,
        tasks: Sequence[OipTask[Any, Any]],
        catalogue: Catalogue,
        lifecycle: Lifecycle,
        limits: Limits,
    ) -> None:
        self._tasks = {task.name: task for task in tasks}
        self.catalogue = catalogue
        self._lifecycle = lifecycle
        self._limits = limits
        self.memory = SharedMemory(limits.max_shared_memory_bytes)

    @property
    def live(self) -> bool:
        """Whether the process should go on."""
        return self._lifecycle.live

    @property
    def ready(self) -> bool:
        """Whether all models answer."""
        if not self._lifecycle.ready:
            return False
        return all(map(self._answers, self.cores))

    @property
    def cores(self) -> Sequence[AnyCore]:
        """The models that are served over this protocol.

        Raises:
            NotReady: the models are still being read.
        """
        return [core for core in self.catalogue.cores if core.card.task in self._tasks]

    def find(self, name: str, version: str = "") -> AnyCore:
        """A model.

        Args:
            name: of the model.
            version: empty means the one that is served.

        Raises:
            UnknownModel: there is none of that name, or not in that version.
            NotReady: the models are still being read.
        """
        cores = {core.card.name: core for core in self.cores}
        core = cores.get(name)
        if core is None:
            served = ", ".join(map(repr, cores)) or "none"
            raise UnknownModel(f"no model {quoted(name)} is served here; there is {served}")
        if version not in ("", core.card.version):
            raise UnknownModel(
                f"the model {quoted(name)} has no version {quoted(version)}; there is "
                f"{quoted(core.card.version)}"
            )
        return core

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a model answers.

        Raises:
            UnknownModel: as `find`.
        """
        try:
            core = self.find(name, version)
        except NotReady:
            return False
        return self._lifecycle.ready and self._answers(core)

    def _answers(self, core: AnyCore) -> bool:
        refusal = core.refusal()
        return refusal is None or not isinstance(refusal.error, NotReady | EngineUnavailable)

    def metadata(self, core: AnyCore) -> ModelMetadata:
        """What the protocol says of a model."""
        card = core.card
        return ModelMetadata(
            card.name,
            (card.version,),
            PLATFORM,
            inputs_of(card),
            tuple(self._tasks[card.task].outputs(core)),
            {
                "task": card.task,
                "variant": card.variant,
                "inputs": "a request has exactly one of them",
                **self._tasks[card.task].properties,
                **explained.described(core),
            },
        )

    def understand(
        self, core: AnyCore, request: InferRequest, named: Priority, owner: str
    ) -> Understood:
        """Read a request for a model.

        Args:
            core: of the model.
            request: as it came.
            named: the class that its head names.
            owner: of the shared memory that it may name.

        Raises:
            ServiceError: it cannot be understood; the message says what was expected.
        """
        task, parameters = self._tasks[core.card.task], Parameters(request.parameters)
        outputs = self._outputs(core, task, request.outputs)
        names = [output.name for output in outputs]
        every_task = {
            "model": core.card.name,
            "timeout_s": parameters.timeout_s,
            "priority": priority.lower(parameters.priority, named),
            **explained.options(parameters, names),
        }
        asked = Asked(parameters, frozenset(names))
        options = task.options(asked, every_task)
        inputs, copied = read_inputs(self.memory, owner, request.inputs)
        uploads = read_images(inputs, core.card, self._limits.max_images)
        wanted = outputs if request.outputs else ()
        return Understood(uploads, options, asked, wanted, owner, copied)

    def _outputs(
        self, core: AnyCore, task: OipTask[Any, Any], requested: Sequence[RequestedOutput]
    ) -> Sequence[RequestedOutput]:
        facts = {one.name: one for one in task.outputs(core)}
        if not requested:
            return [RequestedOutput(name) for name in facts]
        seen: set[str] = set()
        known = frozenset(facts)
        for output in requested:
            if output.name not in known:
                known |= frozenset(explained.output_names(core))
            if output.name not in known:
                raise InvalidRequest(
                    f"{core.card.name} has no output {quoted(output.name)}; expected some of "
                    f"{', '.join(facts)}, or one that says where it looked, see its metadata"
                )
            if output.name in seen:
                raise InvalidRequest(f"the output {quoted(output.name)} is asked for twice")
            seen.add(output.name)
            if _classes_of(output) and output.name not in task.ranked:
                ranked = ", ".join(sorted(task.ranked)) or "none"
                raise InvalidRequest(
                    f"the output {output.name} has no classes to rank; classification is for "
                    f"{ranked}"
                )
        return requested

    def answer(
        self, core: AnyCore, understood: Understood, outcomes: Sequence[Answer | ServiceError]
    ) -> list[Tensor]:
        """The tensors of an answer.

        Raises:
            ServiceError: one of the images failed.
            InvalidOption: the outputs of these images have no one shape.
            InvalidRequest: an output that is wanted was not asked for by the parameters.
        """
        answers: list[Answer] = []
        for outcome in outcomes:
            if isinstance(outcome, ServiceError):
                raise outcome
            answers.append(outcome)
        task = self._tasks[core.card.task]
        facts = {one.name: one.datatype for one in task.outputs(core)}
        extra = explained.values(answers)
        values = {**task.values(core, answers, understood.asked), **extra}
        wanted = understood.outputs or [RequestedOutput(name) for name in (*facts, *extra)]
        tensors = []
        for output in wanted:
            if output.name not in values:
                raise InvalidRequest(
                    f"the output {output.name} is not there: the parameter layers names others"
                )
            value = values[output.name]
            if count := _classes_of(output):
                tensors.append(Tensor(output.name, BYTES, best(value, count, core.labels)))
            else:
                datatype = facts.get(output.name) or _datatype_of(value)
                tensors.append(Tensor(output.name, datatype, value))
        parameters = {output.name: output.parameters for output in wanted}
        return write_outputs(self.memory, understood.owner, parameters, tensors)


def _classes_of(output: RequestedOutput) -> int:
    """How many of the best classes are wanted in place of an output; 0 means the output itself."""
    return Parameters(output.parameters).count("classification") or 0


def _datatype_of(values: Values) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == np.dtype(values.dtype))
