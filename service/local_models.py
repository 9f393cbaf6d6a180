"""The models of one process: from their files to the queue, and the versions that come and go."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import structlog

from service.batching.batcher import Batcher
from service.command_errors import CommandError
from service.memory import give_back
from service.models.card import ModelCard
from service.models.lineup import Lineup, ModelEntry, require_files_of
from service.open_model import OpenModel, Shared, open_model
from service.reloading import LEAVE_S, Became, Change, Outcome, Stamp, compare
from service.tasks.catalogue import Catalogue, Held
from service.tasks.core import AnyCore
from service.tasks.repository import Listed

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Version:
    """A version of a model that serves, or that its last requests still have.

    Attributes:
        stamp: what it was made of.
        opened: the model.
        core: answers for it; `None` when it serves no more.
        running: its batches.
    """

    stamp: Stamp
    opened: OpenModel
    core: AnyCore | None = None
    running: "asyncio.Task[None] | None" = None

    @property
    def card(self) -> ModelCard:
        """What a caller may know of it."""
        return self.opened.facts.card


class LocalModels:
    """The models of one process.

    A new version of a model is read in another thread and loaded beside the batches of the others.
    When it is warm the catalogue gives it to the requests that come from then on; those that were
    given the old one have their answers from it. When nobody holds the old one any more its queue
    is drained and its memory given back, before the next model is loaded: so there is one version
    more than there are models, unless a request holds one for very long.

    Args:
        shared: what the models have in common.
        open_core: what answers for a model.
        catalogue: from which requests have their models.
        changed: is called when a model begins or ceases to fail, and when others serve.
    """

    def __init__(
        self,
        shared: Shared,
        open_core: Callable[[OpenModel], AnyCore],
        catalogue: Catalogue,
        changed: Callable[[], None],
    ) -> None:
        self._shared = shared
        self._open_core = open_core
        self._catalogue = catalogue
        self._changed = changed
        self._serving: list[_Version] = []
        self._leaving: dict[_Version, asyncio.Task[None]] = {}
        self._default: str | None = None
        self._group: asyncio.TaskGroup | None = None
        self._loading: ModelEntry | None = None

    @property
    def loading(self) -> bool:
        """Whether a version is being loaded beside those that serve."""
        return self._loading is not None

    @property
    def opened(self) -> list[OpenModel]:
        """Those that serve."""
        return [version.opened for version in self._serving]

    @property
    def batchers(self) -> list[Batcher[Any, Any]]:
        """The queues of all versions, also of those whose last requests are under way."""
        return [version.opened.batcher for version in (*self._serving, *self._leaving)]

    async def load(self, lineup: Lineup, threads: Executor) -> None:
        """Read the models in other threads, so that probes are answered meanwhile, and load them.

        Raises:
            ModelUnusable: the weights or the class names of a model cannot be used.
            ModelFileError: sizes are given for a model that has a fixed one.
            DeviceUnavailable: a setting that the device cannot follow.
            RuntimeError: a device cannot be used, or a graph cannot be captured.
        """
        loop = asyncio.get_running_loop()
        for entry in lineup.models:
            stamp = Stamp.of(entry)
            opened = await loop.run_in_executor(threads, open_model, entry, self._shared)
            self._serving.append(_Version(stamp, opened))
        for version in self._serving:
            await version.opened.load()
        self._default = lineup.default

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to serve what was loaded.

        Args:
            group: of the tasks that serve.
        """
        self._group = group
        for version in self._serving:
            self._begin(version)
        self._fill()

    def stop(self) -> None:
        """End all that `start` began."""
        for version in (*self._serving, *self._leaving):
            assert version.running is not None
            version.running.cancel()
        for ending in self._leaving.values():
            ending.cancel()

    async def reload(self, lineup: Lineup, only: ModelEntry | None = None) -> Mapping[str, Outcome]:
        """Serve the models of a lineup; see `Models.reload`."""
        serving = {version.stamp: version for version in self._serving}
        changes = compare(serving, lineup, only)
        outcomes = {one.card.name: Outcome("unchanged", one.card.version) for one in changes.same}
        for change in changes.changed:
            name, outcomes[name] = await self._change(change)
        failed = any(outcome.became == "failed" for outcome in outcomes.values())
        for version in changes.gone:
            became: Became = "kept" if failed else "removed"
            outcomes[version.card.name] = Outcome(became, version.card.version)
            if not failed:
                self._replace(version, None)
        order = {entry.name: index for index, entry in enumerate(lineup.models)}
        self._serving.sort(key=lambda one: order.get(one.stamp.entry.name, len(order)))
        if only is None:
            self._default = lineup.default
        self._fill()
        return outcomes

    async def unload(self, name: str) -> Outcome | None:
        """Take a model out of service; see `Models.unload`."""
        version = next((one for one in self._serving if one.card.name == name), None)
        if version is None:
            return None
        self._replace(version, None)
        await self._until_left()
        return Outcome("removed", version.card.version)

    def listed(self) -> Sequence[Listed]:
        """The versions in memory; see `Models.listed`."""
        works = self._shared.dispatch.available
        serving = [
            Listed.serving(one.card.name, one.card.version, works and one.opened.batcher.trusted)
            for one in self._serving
        ]
        loading = [] if self._loading is None else [self._loading]
        return [
            *serving,
            *(Listed(one.name or "", one.version, "LOADING") for one in loading),
            *(Listed(one.card.name, one.card.version, "UNLOADING") for one in self._leaving),
        ]

    async def _until_left(self) -> None:
        """Wait a while for the versions whose last requests are under way."""
        if self._leaving:
            await asyncio.wait(self._leaving.values(), timeout=LEAVE_S)

    async def _change(self, change: Change[_Version]) -> tuple[str, Outcome]:
        """Let a new version take over, and say what became of the model of which name."""
        before = change.before
        await self._until_left()
        self._loading = change.stamp.entry
        try:
            opened = await self._open(change.stamp)
        except Exception as error:
            if not isinstance(error, CommandError):
                log.exception("load failed", model=change.stamp.entry.name)
            name = str(change.stamp.entry.name) if before is None else before.card.name
            served = "" if before is None else before.card.version
            return name, Outcome("failed", served, str(error))
        finally:
            self._loading = None
        version = _Version(change.stamp, opened)
        self._replace(before, version)
        return version.card.name, Outcome(
            "added" if before is None else "reloaded", version.card.version
        )

    async def _open(self, stamp: Stamp) -> OpenModel:
        loop, entry = asyncio.get_running_loop(), stamp.entry
        await loop.run_in_executor(None, require_files_of, entry, self._shared.settings)
        reader = self._shared.reader
        opened = await loop.run_in_executor(reader, open_model, entry, self._shared)
        try:
            await opened.load()
        except BaseException:
            await opened.close()
            await asyncio.to_thread(give_back)
            raise
        return opened

    def _replace(self, before: _Version | None, after: _Version | None) -> None:
        """Let one version serve in the place of another."""
        if before is not None:
            self._serving.remove(before)
            if after is None:
                before.opened.metrics.forget()
            else:
                before.opened.metrics.hide()
        if after is not None:
            self._serving.append(after)
            self._begin(after)
        held = None if before is None or before.core is None else Held(before.core)
        if before is not None:
            before.core = None
        self._fill()
        if before is not None and held is not None:
            assert self._group is not None
            self._leaving[before] = self._group.create_task(self._end(before, held))

    def _begin(self, version: _Version) -> None:
        assert self._group is not None
        batcher = version.opened.batcher
        version.core = self._open_core(version.opened)
        version.running = self._group.create_task(batcher.run())
        batcher.on_change(self._changed)
        batcher.open()

    def _fill(self) -> None:
        cores = [version.core for version in self._serving if version.core is not None]
        self._catalogue.fill(cores, self._default)
        self._changed()

    async def _end(self, version: _Version, held: Held) -> None:
        """Wait until a version has answered its last request, and give its memory back."""
        await held.end()
        version.opened.batcher.begin_drain()
        assert version.running is not None
        await asyncio.wait([version.running])
        await version.opened.close()
        del self._leaving[version]
        log.info("version ended", model=version.card.name, version=version.card.version)
        await asyncio.to_thread(give_back)
