"""The models that a replica serves, by task and name."""

import asyncio
import gc
from collections.abc import Sequence
from typing import NamedTuple
from weakref import finalize

from service.batching.admission import Refusal
from service.errors import NotReady, UnknownModel, quoted
from service.metrics.requests import CountedRequest
from service.priority import Priority
from service.tasks.core import AnyCore


class Refused(NamedTuple):
    """Why a request is not admitted, and by which model, if only one may answer it."""

    model: str | None
    refusal: Refusal


# Between two looks for cores that hold themselves, seconds; doubled each time.
_LOOK_S = 1.0


class Catalogue:
    """The cores of all models, once these are read.

    Who was given a core can be answered by it as long as they hold it, also when `fill` has put
    another one in its place: the core is gone only when nobody holds it any more (`Held`).
    """

    def __init__(self) -> None:
        self._cores: tuple[AnyCore, ...] | None = None
        self._default: str | None = None
        # Kept because every request asks for it.
        self._by_task: dict[str, Sequence[AnyCore]] = {}

    def fill(self, cores: Sequence[AnyCore], default: str | None = None) -> None:
        """Take the models that were read.

        Args:
            cores: in the order of the settings.
            default: name of the one that answers requests without a name.
        """
        self._cores = tuple(cores)
        self._default = default
        self._by_task = {}

    @property
    def cores(self) -> tuple[AnyCore, ...]:
        """In the order of the settings; none where all models were unloaded.

        Raises:
            NotReady: the models are still being read.
        """
        if self._cores is None:
            raise NotReady("the models are still being read")
        return self._cores

    def default(self, task: str) -> AnyCore | None:
        """The model of a task that answers requests without a name.

        The default of the settings, if it has the task, else the first that has it.
        """
        cores = [core for core in self.cores if task in core.tasks]
        named = [core for core in cores if core.card.name == self._default]
        return next(iter(named or cores), None)

    def find(self, task: str, name: str | None) -> AnyCore:
        """The model of a task by its name, or the task's default.

        Raises:
            UnknownModel: none of that task is served under that name.
            NotReady: the models are still being read.
        """
        cores = {core.card.name: core for core in self.cores if task in core.tasks}
        core = self.default(task) if name is None else cores.get(name)
        if core is None:
            wanted = "" if name is None else f" {quoted(name)}"
            served = ", ".join(map(repr, cores)) or "none"
            raise UnknownModel(f"no model{wanted} for this task is served here; there is {served}")
        return core

    def request_read(self, after_s: float) -> None:
        """Note that a request was read so long after it had come, seconds."""
        for core in self._cores or ():
            core.request_read(after_s)

    def check_room(
        self,
        task: str,
        counted: CountedRequest,
        *,
        only: AnyCore | None = None,
        timeout_s: float | None = None,
        places: int = 1,
        priority: Priority = "high",
    ) -> None:
        """Refuse a request before it is read, if no model that may answer it could admit it.

        Args:
            task: of the request.
            counted: gets the name of the model, where no other may answer.
            only: the model that answers, where the rest of the request cannot name another.
            timeout_s: after which an answer is of no use, seconds, where that is known.
            places: that it needs, as far as is known.
            priority: its class, as far as is known.

        Raises:
            UnknownModel: there is no model of that task.
            NotReady: the replica does not admit yet, or no longer.
            EngineUnavailable: nothing can be computed.
            Overloaded: all queues are full, or the answer would come too late.
        """
        refused = self.refusal(
            task, only=only, timeout_s=timeout_s, places=places, priority=priority
        )
        if refused is None:
            return
        counted.images = 1  # at least, of a request that nobody reads
        if refused.model is not None:
            counted.model = refused.model
        self._candidates(task, only)[0].check_room(timeout_s, places, priority)

    def refusal(
        self,
        task: str,
        *,
        only: AnyCore | None = None,
        timeout_s: float | None = None,
        places: int = 1,
        priority: Priority = "high",
    ) -> Refused | None:
        """Why `check_room` would refuse a request, if it would; asking counts nowhere.

        Raises:
            UnknownModel: there is no model of that task.
            NotReady: the models are still being read.
        """
        cores = self._candidates(task, only)
        refusals = []
        for core in cores:
            refusal = core.refusal(timeout_s, places, priority)
            if refusal is None:
                return None
            refusals.append(refusal)
        return Refused(cores[0].card.name if len(cores) == 1 else None, refusals[0])

    def _candidates(self, task: str, only: AnyCore | None) -> Sequence[AnyCore]:
        """The models that may answer a request."""
        if only is not None:
            return [only]
        if task not in self._by_task:
            of_task = [core for core in self.cores if task in core.tasks]
            self._by_task[task] = of_task or [self.find(task, None)]
        cores: Sequence[AnyCore] = self._by_task[task]
        return cores

    def describe(self, name: str | None) -> AnyCore:
        """The model of any task by its name, or the first default.

        Raises:
            UnknownModel: none is served under that name.
            NotReady: the models are still being read.
        """
        names = [core.card.name for core in self.cores]
        default = self._default if self._default in names else next(iter(names), None)
        wanted = name or default
        for core in self.cores:
            if core.card.name == wanted:
                return core
        served = ", ".join(map(repr, names)) or "none"
        called = "" if wanted is None else f" {quoted(wanted)}"
        raise UnknownModel(f"no model{called} is served here; there is {served}")

    def is_default(self, core: AnyCore) -> bool:
        """Whether a core answers the requests of its task that name no model."""
        return core is self.default(core.card.task)


class Held:
    """Whether anybody still holds a core; holds none itself.

    Args:
        core: that is in no catalogue any more.
    """

    def __init__(self, core: AnyCore) -> None:
        loop, self._gone = asyncio.get_running_loop(), asyncio.Event()

        def note() -> None:
            # In whichever thread lets go of it.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._gone.set)

        finalize(core, note).atexit = False

    async def end(self) -> None:
        """Wait until nobody holds it."""
        pause_s = _LOOK_S
        while not self._gone.is_set():
            try:
                async with asyncio.timeout(pause_s):
                    await self._gone.wait()
            except TimeoutError:
                gc.collect()  # a failure may hold the frames that it came through, and they it
                pause_s *= 2
