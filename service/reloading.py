"""Reloading: what changed in the lineup of a server, and what became of each model.

A reload reads the model file again and looks at the files of every model. Each version that is new
is loaded beside the one that serves, which goes on where the new one cannot be used. To load a
model is the same for one model alone. How that is done, one process (`local_models`) and many
(`processes.rollout`) each know for themselves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

import structlog
from prometheus_client import Metric

from service.command_errors import CommandError
from service.errors import (
    Draining,
    ModelNotLoaded,
    NotReady,
    Overloaded,
    ServiceError,
    UnknownModel,
    quoted,
)
from service.metrics.replica import Metrics, Reload
from service.models.lineup import Lineup, ModelEntry, choose_models
from service.settings.settings import Settings
from service.tasks.repository import Listed
from service.tasks.statistics import ModelStatistics, Statistics

# Until the last requests of a version are waited for before the next one is loaded, seconds.
LEAVE_S = 60.0
# Loads and unloads that may wait for each other, and when a caller beyond them may try again.
_MOST_ASKED, _AGAIN_S = 16, 5.0

Became = Reload | Literal["unchanged", "kept"]
Version = TypeVar("Version")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes:
        became: `reloaded`, `added`, `removed` or `unchanged`; `failed` where its new version cannot
            be used, and the one before goes on, if there is one; `kept` where it would have been
            removed, had not another model failed.
        version: that is served now; empty where there is none.
        reason: why it failed.
    """

    became: Became
    version: str = ""
    reason: str = ""


class Stamp(NamedTuple):
    """What a version of a model was made of; another one is another version.

    Attributes:
        entry: its settings.
        files: of each of its files what differs when it was written or replaced; nothing of one
            that is not there.
    """

    entry: ModelEntry
    files: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, entry: ModelEntry) -> "Stamp":
        """The stamp of what would be loaded now; to be taken before it is."""
        return cls(entry, tuple(_state(path) for _, path in entry.files))


def _state(path: Path) -> tuple[int, ...]:
    try:
        state = path.stat()
    except OSError:
        return ()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


class Change(NamedTuple, Generic[Version]):
    """A model of which there is a new version.

    Attributes:
        stamp: of the new version.
        before: the version that serves, if there is one.
    """

    stamp: Stamp
    before: Version | None


class Changes(NamedTuple, Generic[Version]):
    """What a lineup changes.

    Attributes:
        changed: models with a new version, also those that are new themselves.
        same: versions that stay.
        gone: versions of models that are in the lineup no more.
    """

    changed: list[Change[Version]]
    same: list[Version]
    gone: list[Version]


def compare(
    serving: Mapping[Stamp, Version], lineup: Lineup, only: ModelEntry | None = None
) -> Changes[Version]:
    """What a lineup changes of what serves.

    Args:
        serving: the versions that serve, by what they were made of.
        lineup: that is wanted.
        only: the one model of it that is looked at; nothing is said of others.
    """
    by_name = {stamp.entry.name: version for stamp, version in serving.items()}
    changed, same = [], []
    for entry in lineup.models if only is None else [only]:
        stamp = Stamp.of(entry)
        before = by_name.pop(entry.name, None)
        if stamp in serving:
            same.append(serving[stamp])
        else:
            changed.append(Change(stamp, before))
    return Changes(changed, same, list(by_name.values()) if only is None else [])


class Models(Protocol):
    """The models of a server, of one process or of many."""

    async def reload(self, lineup: Lineup, only: ModelEntry | None = None) -> Mapping[str, Outcome]:
        """Serve the models of a lineup, each in the version that its settings and files are now.

        Where a version cannot be loaded the one before goes on, and no model of others is removed.
        To be called once at a time, as is `unload`.

        Args:
            lineup: that is wanted.
            only: the one model of it that is loaded; all others stay as they are, also those that
                do not serve.

        Returns:
            What became of each model that was looked at, by its name.
        """

    async def unload(self, name: str) -> Outcome | None:
        """Take a model out of service, and wait a while until its memory is given back.

        Returns:
            What became of it; nothing where no model of that name serves.
        """

    def listed(self) -> Sequence[Listed]:
        """The versions in memory, first those that serve."""


class Reloads:
    """Reloads, loads and unloads one after the other, each with what is wanted when it begins.

    It is the `Repository` of its server.

    Args:
        settings: of the server; what is in the environment stays as it was at the start.
        models: of the server.
        metrics: count the outcomes.
        wanted: is set to ask for a reload; when one is under way, for another one after it.
        collect: the metrics of all processes; is called in another thread.
    """

    def __init__(
        self,
        settings: Settings,
        models: Models,
        metrics: Metrics,
        wanted: asyncio.Event,
        collect: Callable[[], Iterable[Metric]],
    ) -> None:
        self._settings = settings
        self._models = models
        self._metrics = metrics
        self._wanted = wanted
        self._statistics = Statistics(collect)
        self._turn = asyncio.Lock()
        self._asked: set[asyncio.Task[None]] = set()  # loads and unloads
        self._failed: dict[str, str] = {}  # why, by the names of models
        self._unnamed: str | None = None  # what a model without a name is called
        # What callers are told who come too early or too late.
        self._refusal: Callable[[], ServiceError] | None = _starting

    async def run(self) -> None:
        """Reload when asked to, for ever."""
        self._learn_name()
        self._refusal = None
        try:
            while True:
                await self._wanted.wait()
                self._wanted.clear()
                async with self._turn:
                    await self.once()
        finally:
            self._refusal = _leaving
            for task in self._asked:
                task.cancel()

    async def once(self) -> Mapping[str, Outcome]:
        """Reload once, and log and count what became of each model.

        Nothing is reloaded, and nothing returned, where the model file cannot be used.
        """
        log.info("reloading")
        try:
            lineup = choose_models(self._settings)
        except CommandError as error:
            self._metrics.model_reloads["failed"].inc()
            log.error("reload failed", reason=str(error))  # noqa: TRY400
            return {}
        outcomes = await self._models.reload(lineup)
        for name, outcome in outcomes.items():
            self._note(name, outcome)
        self._learn_name()
        log.info("reloaded", failed=sum(one.became == "failed" for one in outcomes.values()))
        return outcomes

    def _note(self, name: str, outcome: Outcome) -> None:
        self._failed.pop(name, None)
        if outcome.became == "failed":
            self._failed[name] = outcome.reason
            log.error("model not reloaded", model=name, reason=outcome.reason)
        elif outcome.became in ("unchanged", "kept"):
            log.info("model stays", model=name, version=outcome.version)
        else:
            log.info("model " + outcome.became, model=name, version=outcome.version)
        if outcome.became not in ("unchanged", "kept"):
            self._metrics.model_reloads[outcome.became].inc()

    # What callers ask for; see `Repository`

    async def index(self) -> Sequence[Listed]:
        """Every model of the settings, and every version that is in memory."""
        in_memory = []
        for one in self._models.listed():
            name = one.name or self._unnamed or ""
            failed = self._failed.get(name, "") if one.state == "READY" else ""
            in_memory.append(replace(one, name=name, reason=one.reason or failed))
        names = {one.name for one in in_memory}
        with suppress(CommandError):  # a model file that cannot be used changes nothing
            lineup = await asyncio.to_thread(choose_models, self._settings)
            for entry in lineup.models:
                name = self._name(entry)
                if name not in names:
                    reason = self._failed.get(name, "not loaded")
                    in_memory.append(Listed(name, entry.version, "UNAVAILABLE", reason))
        return in_memory

    async def statistics(self) -> Mapping[str, ModelStatistics]:
        """What was done for each model since the start, by its name."""
        return await self._statistics.read()

    async def load(self, name: str) -> None:
        """Load a model; see `Repository.load`."""
        await self._in_turn(partial(self._load, name))

    async def unload(self, name: str) -> None:
        """Take a model out of service; see `Repository.unload`."""
        await self._in_turn(partial(self._unload, name))

    async def _load(self, name: str) -> None:
        try:
            lineup = await asyncio.to_thread(choose_models, self._settings)
        except CommandError as error:
            raise ModelNotLoaded(str(error)) from error
        entries = {self._name(entry): entry for entry in lineup.models}
        if name not in entries:
            raise _unknown(name, entries)
        log.info("loading", model=name)
        (outcome,) = (await self._models.reload(lineup, entries[name])).values()
        self._learn_name()
        self._note(name, outcome)
        if outcome.became == "failed":
            goes_on = f"; version {outcome.version} goes on" if outcome.version else ""
            raise ModelNotLoaded(f"{name}: {outcome.reason}{goes_on}")

    async def _unload(self, name: str) -> None:
        outcome = await self._models.unload(name)
        if outcome is not None:
            self._note(name, outcome)
            return
        known = {one.name for one in await self.index()}
        if name not in known:
            raise _unknown(name, known)

    def _learn_name(self) -> None:
        for one in self._models.listed()[:1]:
            self._unnamed = one.name or self._unnamed

    def _name(self, entry: ModelEntry) -> str:
        """What a model is called; one without a name, which is the only one, by its variant."""
        return entry.name or self._unnamed or ""

    async def _in_turn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what a caller asks for, to its end, also where they leave meanwhile."""
        if self._refusal is not None:
            raise self._refusal()
        if len(self._asked) >= _MOST_ASKED:
            raise Overloaded("too many models wait to be loaded or unloaded", _AGAIN_S)

        async def wait_and_work() -> None:
            async with self._turn:
                await work()

        task = asyncio.create_task(wait_and_work())
        self._asked.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait([task])
        if task.cancelled():
            raise _leaving()
        task.result()

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left


def _starting() -> ServiceError:
    return NotReady("the models are still being read")


def _leaving() -> ServiceError:
    return Draining("the server is leaving")


def _unknown(name: str, known: Iterable[str]) -> ServiceError:
    has = ", ".join(map(repr, known))
    return UnknownModel(
        f"the settings of this server have no model {quoted(name)}; they have {has}"
    )
