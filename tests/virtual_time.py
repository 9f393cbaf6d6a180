"""An event loop whose clock stands still while anything runs, and jumps to the next timer.

So a test can let hours pass, and what it measures is the same on any machine, however busy.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from service.batching import batcher, dispatch

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
        self.selector = _Jumping()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario of batchers, all clocks of which are virtual; no threads may take part."""
    loop = _Loop()
    with (
        pytest.MonkeyPatch.context() as patch,
        asyncio.Runner(loop_factory=lambda: loop) as runner,
    ):
        for module in (batcher, dispatch):
            patch.setattr(module, "perf_counter", loop.time)
        return runner.run(scenario)
