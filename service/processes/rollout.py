"""Which version of each model serves, and how another one takes its place in all processes.

A version has a place: an index on the board, in the worker processes and in the front ends. A new
version gets a free place, so that it and the one before it are never taken for each other:

1. The supervisor tells every worker to load it (`Load`). They do so beside the batches that they
   run, and answer `Loaded`, with all that is known of the model, or `NotLoaded`.
2. If one cannot, or ends meanwhile, all that have it are told to unload it, and the version before
   goes on. If all can, the supervisor tells every front end what serves from now on (`Models`): a
   front end has the requests that come answered by the new version, which is a queue, a core and
   slots of its own, and those that it has go on with the one before.
3. A front end tells what it has (`Follows`). When no front end has anything of the version before,
   the workers are told to unload it (`Unload`), and when they have (`Unloaded`) its place is free.

Whatever ends in the middle: a front end that is started is told what serves; a worker that is
started loads all that serves and all that front ends still have, from the files that were there
when it was first loaded, which the supervisor keeps open. There is one version more than there
are models, unless a request holds one for very long.
"""

import asyncio
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from service.command_errors import CommandError
from service.models.card import ModelFacts
from service.models.lineup import Lineup, ModelEntry, ModelFileError, require_files_of
from service.processes.board import Board
from service.processes.channel import from_memory, in_memory
from service.processes.child import Child
from service.processes.messages import (
    Follows,
    Load,
    Loaded,
    Models,
    NotLoaded,
    Unload,
    Unloaded,
)
from service.reloading import LEAVE_S, Became, Change, Outcome, Stamp, compare
from service.settings.settings import Settings
from service.tasks.repository import Listed

log = structlog.get_logger(__name__)

# For models that are added, and for one version more than there are models.
_ROOM = 16
# Until all front ends follow what serves: one that stands still is replaced before, seconds.
_FOLLOW_S = 15.0


def places(lineup: Lineup) -> int:
    """How many places there are in a server that starts with a lineup."""
    return len(lineup.models) + _ROOM


class _Files:
    """The files of a version, kept open: they are what they were when their names are others'.

    Args:
        entry: that names them.
        folder: in which they are found while they are open; it is made.

    Attributes:
        entry: that names them there.

    Raises:
        OSError: a file cannot be opened.
    """

    def __init__(self, entry: ModelEntry, folder: Path) -> None:
        self._folder = folder
        self._descriptors: list[int] = []
        found: dict[str, Path] = {}
        folder.mkdir(mode=0o700)
        for field_, path in entry.files:
            self._descriptors.append(os.open(path, os.O_RDONLY))
            # Its kind is told by the end of its name.
            found[field_] = link = folder / f"{field_}-{path.name}"
            link.symlink_to(f"/proc/{os.getpid()}/fd/{self._descriptors[-1]}")
        self.entry = entry.model_copy(update=found)

    def close(self) -> None:
        """Close them."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(eq=False)
class _Version:
    """A version of a model at its place.

    Attributes:
        place: on the board.
        stamp: what it was made of.
        files: likewise.
        told: workers that were told to load it, and have not said that it is not there.
        workers: those of them that have it.
        facts: what is known of the model, once a worker has loaded it.
        failed: why it cannot be loaded.
        left: the generation from which on it serves no more.
        unloading: whether the workers were told to unload it.
    """

    place: int
    stamp: Stamp
    files: _Files
    told: set[int] = field(default_factory=set)
    workers: set[int] = field(default_factory=set)
    facts: ModelFacts | None = None
    failed: str | None = None
    left: int | None = None
    unloading: bool = False

    @property
    def name(self) -> str:
        """Of the model."""
        return str(self.stamp.entry.name) if self.facts is None else self.facts.card.name

    @property
    def version(self) -> str:
        """As answers call it."""
        return self.stamp.entry.version


class Rollout:
    """The versions of all models, in the process of the supervisor.

    Args:
        settings: of the server.
        lineup: that it starts with.
        board: of the server, with `places`.
        workers: the worker processes.
        front_ends: the front ends.
        folder: that is the server's own.
    """

    def __init__(
        self,
        settings: Settings,
        lineup: Lineup,
        board: Board,
        workers: Sequence[Child],
        front_ends: Sequence[Child],
        *,
        folder: Path,
    ) -> None:
        self._settings = settings
        self._board = board
        self._workers = workers
        self._front_ends = front_ends
        self._folder = folder
        self._opened = 0  # versions so far
        self._useful: set[int] = set()  # workers that have all that serves
        self._free = list(reversed(range(board.extent.models)))
        self._serving: list[_Version] = []
        self._loading: list[_Version] = []
        self._leaving: list[_Version] = []
        self._default = lineup.default
        self._generation = 0
        self._follows: dict[int, Follows] = {}
        self._news = asyncio.Event()
        for entry in lineup.models:
            self._serving.append(self._open(Stamp.of(entry)))

    @property
    def names(self) -> list[str]:
        """Of the models that serve."""
        return [version.name for version in self._serving]

    @property
    def default(self) -> str:
        """Name of the model that answers requests without a name."""
        names = self.names
        return self._default if self._default is not None and self._default in names else names[0]

    def places(self) -> dict[str, list[int]]:
        """The places of each model that serves, with that of a version that leaves."""
        found: dict[str, list[int]] = {version.name: [] for version in self._serving}
        for version in (*self._serving, *self._leaving):
            if version.name in found:
                found[version.name].append(version.place)
        return found

    def close(self) -> None:
        """Let go of the files."""
        for version in (*self._serving, *self._loading, *self._leaving):
            version.files.close()

    # What the processes do

    def worker_begins(self, index: int) -> None:
        """Tell a worker that was started what it is to load."""
        had = [version for version in self._leaving if not version.unloading]
        self._tell_to_load(index, [*self._serving, *had])

    def worker_ended(self, index: int) -> None:
        """Note that a worker has nothing any more."""
        self._useful.discard(index)
        for version in (*self._serving, *self._loading, *self._leaving):
            version.told.discard(index)
            version.workers.discard(index)
        for version in self._loading:
            version.failed = f"{self._workers[index].name} ended meanwhile"
        self._look()

    def of_worker(self, index: int, message: Any, descriptors: Sequence[int]) -> None:
        """Take what a worker tells."""
        facts = from_memory(descriptors[0]) if isinstance(message, Loaded) else None
        version = self._at(message.place)
        if version is None:
            return
        if isinstance(message, Loaded):
            version.workers.add(index)
            if version.facts is None:
                version.facts = facts
                if version in self._serving and self._all_known:
                    self._tell_front_ends(range(len(self._front_ends)))
            if index not in self._useful and all(index in one.workers for one in self._serving):
                self._useful.add(index)
                self._workers[index].is_useful()
        elif isinstance(message, NotLoaded):
            version.failed = message.reason
            if not version.unloading:  # else it answers that too, and only then its place is free
                version.told.discard(index)
        elif isinstance(message, Unloaded):
            version.told.discard(index)
            version.workers.discard(index)
        self._look()

    def front_end_begins(self, index: int) -> None:
        """Tell a front end that was started what serves."""
        self._follows[index] = Follows(-1, ())
        if self._all_known:
            self._tell_front_ends([index])

    def front_end_ended(self, index: int) -> None:
        """Note that a front end has nothing any more."""
        self._follows.pop(index, None)
        self._look()

    def of_front_end(self, index: int, message: Follows) -> None:
        """Take what a front end has."""
        self._follows[index] = message
        self._look()

    # Reloading

    async def reload(self, lineup: Lineup, only: ModelEntry | None = None) -> Mapping[str, Outcome]:
        """Serve the models of a lineup; see `Models.reload`."""
        await self._until(lambda: self._all_known)
        serving = {version.stamp: version for version in self._serving}
        changes = compare(serving, lineup, only)
        outcomes = {one.name: Outcome("unchanged", one.version) for one in changes.same}
        for change in changes.changed:
            name, outcomes[name] = await self._change(change)
        failed = any(outcome.became == "failed" for outcome in outcomes.values())
        for version in changes.gone:
            became: Became = "kept" if failed else "removed"
            outcomes[version.name] = Outcome(became, version.version)
        moved = [] if failed else changes.gone
        told = list(self._serving), self._default
        order = {entry.name: index for index, entry in enumerate(lineup.models)}
        self._serving.sort(key=lambda one: order.get(one.stamp.entry.name, len(order)))
        if only is None:
            self._default = lineup.default
        if moved or told != (self._serving, self._default):
            self._replace(moved, [])
        await self._until_followed()
        return outcomes

    async def unload(self, name: str) -> Outcome | None:
        """Take a model out of service; see `Models.unload`."""
        version = next((one for one in self._serving if one.name == name), None)
        if version is None:
            return None
        self._replace([version], [])
        await self._until_followed()
        await self._until_left()
        return Outcome("removed", version.version)

    def listed(self) -> Sequence[Listed]:
        """The versions in memory; see `Models.listed`."""
        working = self._board.serving
        return [
            *(
                Listed.serving(one.name, one.version, bool(working[:, one.place].any()))
                for one in self._serving
            ),
            *(Listed(one.stamp.entry.name or "", one.version, "LOADING") for one in self._loading),
            *(
                Listed(one.name, one.version, "UNLOADING")
                for one in self._leaving
                if one.failed is None
            ),
        ]

    async def _change(self, change: Change[_Version]) -> tuple[str, Outcome]:
        """Let a new version take over, and say what became of the model of which name."""
        before = change.before
        await self._until_left()
        everybody = set(range(len(self._workers)))
        await self._until(lambda: all(one.workers == everybody for one in self._serving))
        try:
            require_files_of(change.stamp.entry, self._settings)
            version = self._open(change.stamp)
        except (CommandError, OSError) as error:
            reason = str(error)
        else:
            reason = await self._load(version)
        if reason:
            name = str(change.stamp.entry.name) if before is None else before.name
            return name, Outcome("failed", "" if before is None else before.version, reason)
        self._replace([] if before is None else [before], [version])
        return version.name, Outcome("added" if before is None else "reloaded", version.version)

    async def _load(self, version: _Version) -> str:
        """Have all workers load a version, and say why they have not, if so."""
        self._loading.append(version)
        everybody = set(range(len(self._workers)))
        for index in everybody:
            self._tell_to_load(index, [version])
        try:
            await self._until(lambda: version.failed is not None or version.workers == everybody)
        finally:
            self._loading.remove(version)
        if version.failed is not None:
            self._leave(version)
        return version.failed or ""

    def _open(self, stamp: Stamp) -> _Version:
        if not self._free:
            room = self._board.extent.models - 1
            raise ModelFileError(f"there is room for {room} models; a restart makes more")
        self._opened += 1
        files = _Files(stamp.entry, self._folder / f"version-{self._opened}")
        return _Version(self._free.pop(), stamp, files)

    def _replace(self, before: Sequence[_Version], after: Sequence[_Version]) -> None:
        """Let versions serve in the place of others."""
        self._generation += 1
        self._serving = [one for one in self._serving if one not in before]
        self._serving += after
        self._tell_front_ends(range(len(self._front_ends)))
        for version in before:
            self._leave(version)

    def _leave(self, version: _Version) -> None:
        version.left = self._generation
        self._leaving.append(version)
        self._look()

    def _look(self) -> None:
        """Unload what no front end has, and let go of what no worker has."""
        for version in list(self._leaving):
            if not version.unloading and not self._is_had(version):
                version.unloading = True
                for index in version.told:
                    self._workers[index].send(Unload(version.place))
            if version.unloading and not version.told:
                self._leaving.remove(version)
                self._board.clear(version.place)
                self._free.append(version.place)
                version.files.close()
                if version.failed is None:
                    log.info("version ended", model=version.name, version=version.version)
        self._news.set()

    def _is_had(self, version: _Version) -> bool:
        """Whether a front end has anything of a version that leaves."""
        assert version.left is not None
        return any(
            one.generation < version.left or version.place in one.places
            for one in self._follows.values()
        )

    async def _until_left(self) -> None:
        """Wait a while for the versions whose last requests are under way."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._until(lambda: not self._leaving)

    async def _until_followed(self) -> None:
        """Wait a while until every front end answers by what serves now."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FOLLOW_S):
                await self._until(
                    lambda: all(
                        one.generation >= self._generation for one in self._follows.values()
                    )
                )

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()

    @property
    def _all_known(self) -> bool:
        return all(version.facts is not None for version in self._serving)

    def _at(self, place: int) -> _Version | None:
        every = (*self._serving, *self._loading, *self._leaving)
        return next((version for version in every if version.place == place), None)

    def _tell_to_load(self, index: int, versions: Sequence[_Version]) -> None:
        for version in versions:
            version.told.add(index)
        entries = [(version.place, version.files.entry) for version in versions]
        descriptor = in_memory(entries)
        self._workers[index].send(Load(), [descriptor])
        os.close(descriptor)

    def _tell_front_ends(self, indices: Sequence[int]) -> None:
        descriptor = in_memory({version.place: version.facts for version in self._serving})
        for index in indices:
            self._front_ends[index].send(Models(self._generation, self._default), [descriptor])
        os.close(descriptor)
