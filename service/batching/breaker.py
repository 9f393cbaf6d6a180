"""Whether a model may be trusted, by how its batches end. Knows nothing of torch or queues."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Protocol

from service.errors import EngineUnavailable

SUSPECT_AFTER = 5  # batches in a row
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_GROW_AFTER = 64  # batches


class Shown(Protocol):
    """Shows a number, as a gauge does."""

    def set(self, value: float, /) -> None:
        """Show it."""
        ...


class Breaker:
    """Closed while a model works; open, and nothing is asked of the model, while it does not.

    Several failed batches in a row may be the work of one caller, so they only make it suspect:
    a trial with a blank item decides. While it is open a trial decides again and again, after
    pauses that grow.

    Args:
        gauge: shows 1 while it is open.
    """

    def __init__(self, gauge: Shown) -> None:
        self._gauge = gauge
        self._failed = 0  # batches since the last that worked
        self._trials = 0  # that failed in a row
        self._opened = asyncio.Event()
        self._on_change: Callable[[], None] = lambda: None

    @property
    def open(self) -> bool:
        """Whether the model is out of use."""
        return self._opened.is_set()

    @property
    def suspect(self) -> bool:
        """Whether a trial is due, in the middle of the work."""
        return self._failed >= SUSPECT_AFTER and not self.open

    @property
    def pause_s(self) -> float:
        """Until the next trial while it is open, seconds."""
        return _PAUSES_S[min(self._trials, len(_PAUSES_S)) - 1]

    def on_change(self, observer: Callable[[], None]) -> None:
        """Call an observer when the breaker opens and closes."""
        self._on_change = observer

    async def opened(self) -> None:
        """Wait until the breaker is open."""
        await self._opened.wait()

    def worked(self) -> None:
        """Learn that a batch or a trial worked."""
        self._failed = self._trials = 0
        if self.open:
            self._opened.clear()
            self._show()

    def failed(self) -> None:
        """Learn that nothing of a batch worked."""
        self._failed += 1

    def convict(self) -> None:
        """Learn that a trial failed: the model is out of use."""
        self._trials += 1
        if not self.open:
            self._opened.set()
            self._show()

    def error(self) -> EngineUnavailable:
        """What callers are told while it is open."""
        return EngineUnavailable(
            "the model fails again and again; ask another replica, or later: this one tries "
            "the model from time to time",
            "error",
            retry_after_s=self.pause_s,
        )

    def _show(self) -> None:
        self._gauge.set(self.open)
        self._on_change()


class Fit:
    """How many items of a group fit into a batch, learned from those that did not.

    Args:
        most: items in any batch.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limits: dict[Hashable, int] = {}
        self._good: dict[Hashable, int] = {}  # batches at the limit since it last changed

    def limit(self, group: Hashable) -> int:
        """Items of the group that are tried together."""
        return self._limits.get(group, self._most)

    def failed(self, group: Hashable, size: int) -> None:
        """Learn that so many items did not fit."""
        self._limits[group] = max(1, size // 2)
        self._good[group] = 0

    def worked(self, group: Hashable, size: int) -> None:
        """Learn that so many items fitted; a limit that held often enough may grow again."""
        if group not in self._limits or size < self._limits[group]:
            return
        self._good[group] += 1
        if self._good[group] == _GROW_AFTER:
            self._limits[group] *= 2
            self._good[group] = 0
            if self._limits[group] >= self._most:
                del self._limits[group], self._good[group]
