"""Reloading: what changed in the lineup of a server, and what became of each model.

A reload reads the model file again and looks at the files of every model. Each version that is new
is loaded beside the one that serves, which goes on where the new one cannot be used. How that is
done, one process (`local_models`) and many (`processes.supervisor`) each know for themselves.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import structlog

from service.command_errors import CommandError
from service.metrics import Metrics, Reload
from service.models.lineup import Lineup, ModelEntry, choose_models
from service.settings import Settings

# Until the last requests of a version are waited for before the next one is loaded, seconds.
LEAVE_S = 60.0

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


def compare(serving: Mapping[Stamp, Version], lineup: Lineup) -> Changes[Version]:
    """What a lineup changes of what serves.

    Args:
        serving: the versions that serve, by what they were made of.
        lineup: that is wanted.
    """
    by_name = {stamp.entry.name: version for stamp, version in serving.items()}
    changed, same = [], []
    for entry in lineup.models:
        stamp = Stamp.of(entry)
        before = by_name.pop(entry.name, None)
        if stamp in serving:
            same.append(serving[stamp])
        else:
            changed.append(Change(stamp, before))
    return Changes(changed, same, list(by_name.values()))


class Reloads:
    """Reloads one after the other, each with what is wanted when it begins.

    Args:
        settings: of the server; what is in the environment stays as it was at the start.
        reload: does it, and says what became of each model by its name.
        metrics: count the outcomes.
        wanted: is set to ask for a reload; when one is under way, for another one after it.
    """

    def __init__(
        self,
        settings: Settings,
        reload: Callable[[Lineup], Awaitable[Mapping[str, Outcome]]],
        metrics: Metrics,
        wanted: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._reload = reload
        self._metrics = metrics
        self._wanted = wanted

    async def run(self) -> None:
        """Reload when asked to, for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await self.once()

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
        outcomes = await self._reload(lineup)
        for name, outcome in outcomes.items():
            if outcome.became == "failed":
                log.error("model not reloaded", model=name, reason=outcome.reason)
            elif outcome.became in ("unchanged", "kept"):
                log.info("model stays", model=name, version=outcome.version)
            else:
                log.info("model " + outcome.became, model=name, version=outcome.version)
            if outcome.became not in ("unchanged", "kept"):
                self._metrics.model_reloads[outcome.became].inc()
        log.info("reloaded", failed=sum(one.became == "failed" for one in outcomes.values()))
        return outcomes
