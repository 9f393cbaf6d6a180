"""The calls that come while gRPC is about to stop."""

import asyncio
from time import monotonic
from typing import Any

# None is likely to come when none has come for so long, and none is being handed over when none has
# come for so many turns of the event loop: it takes a few, and they are long when the loop is busy.
_SILENCE_S = 0.025
_SILENT_TURNS = 10


class LastCalls:
    """Lets calls wait while gRPC is about to stop, so that it loses none of them.

    gRPC cancels the calls that it has received and not handed over when it stops, and whoever
    called is told CANCELLED, which no client tries again. A busy server has such calls at any
    moment. When new calls wait, those who call one after the other fall silent, and there is a
    moment without any.
    """

    def __init__(self) -> None:
        self._came = 0
        self._answered = asyncio.Event()
        self._answered.set()
        self._waiting: list[asyncio.Task[Any]] = []

    async def enter(self) -> None:
        """Wait, in the task that answers a call, until the call can be answered."""
        self._came += 1
        if not self._answered.is_set():
            task = asyncio.current_task()
            assert task is not None
            self._waiting.append(task)
            await self._answered.wait()

    async def hold(self, within_s: float) -> None:
        """Let the calls that come wait, and return when none comes, or after some time."""
        self._answered.clear()
        end = monotonic() + within_s
        while monotonic() < end:
            before = self._came
            await asyncio.sleep(_SILENCE_S)
            for _ in range(_SILENT_TURNS):
                await asyncio.sleep(0)
            if self._came == before:
                return

    async def answer(self, within_s: float) -> None:
        """Let the calls that wait go on, and return when all are answered, or after some time."""
        self._answered.set()
        if self._waiting:
            await asyncio.wait(self._waiting, timeout=within_s)
            self._waiting.clear()
