"""An event loop whose clock stands still while anything runs, and jumps to the next timer.

So a test can let hours pass, and what it measures is the same on any machine, however busy.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from service.batching import batcher, dispatch, gathering

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    """Waits no time, and counts it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "nothing will happen any more"
        self.now += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jumping = _Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


class VirtualTime:
    """Runs batchers, all clocks of which are virtual; no threads may take part.

    Attributes:
        loop: in which they run.
    """

    def __init__(self) -> None:
        self.loop = _Loop()
        self._runner = asyncio.Runner(loop_factory=lambda: self.loop)
        self._patch = pytest.MonkeyPatch()
        for module in (batcher, dispatch, gathering):
            self._patch.setattr(module, "perf_counter", self.loop.time)

    def now(self) -> float:
        """The time of the loop, seconds."""
        return self.loop.time()

    def run(self, scenario: Coroutine[Any, Any, T]) -> T:
        """Run until the end of a scenario; what else it began stands still then."""
        return self._runner.run(scenario)

    def close(self) -> None:
        """End everything."""
        self._runner.close()
        self._patch.undo()


def in_virtual_time(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario that begins at 0 seconds."""
    time = VirtualTime()
    try:
        return time.run(scenario)
    finally:
        time.close()
