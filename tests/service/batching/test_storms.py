"""More callers than can be answered in their time, in virtual time.

A device takes 3 ms for a batch and 1.4 ms for each of its images, at most 32; two threads decode,
and the host takes 0.05 ms for a request. Callers that leave ask again three times.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from math import inf

import pytest

from service.batching.dispatch import Dispatch
from service.batching.forecast import Forecast
from service.errors import ServiceError
from tests.service.batching.test_batcher import Seat, opened
from tests.virtual_time import in_virtual_time

MAX_BATCH = 32
SECONDS = 2.0
ASK_AGAIN = 3


class Storm:
    """A batcher, and callers that come at random.

    Attributes:
        ends: how requests ended.
        computed: images.
    """

    def __init__(self, *, slower: float = 1.0) -> None:
        self.ends: Counter[str] = Counter()
        self.computed = 0
        self._slower = slower
        self._chance = random.Random(0)
        self._host, self._threads = asyncio.Lock(), asyncio.Semaphore(2)
        self._batcher, _ = opened(
            self._device,
            max_batch=MAX_BATCH,
            queue_limit=256,
            dispatch=Dispatch([Seat()]),
            forecast=Forecast(asyncio.get_running_loop().time),
        )
        self.running = asyncio.create_task(self._batcher.run())

    async def _device(self, items):
        took_s = self._slower * (0.003 + 0.0014 * len(items))
        await asyncio.sleep(took_s * self._chance.uniform(0.9, 1.1))
        self.computed += len(items)
        return items

    async def ask(self, timeout_s: float | None = None) -> str:
        now = asyncio.get_running_loop().time
        until = inf if timeout_s is None else now() + timeout_s
        async with self._host:
            await asyncio.sleep(0.00005)
        left_s = None if timeout_s is None else until - now()
        try:
            with self._batcher.admit(1, left_s, decode_s=0.001) as admission:
                async with self._batcher.ahead(admission, until) as turn:
                    async with self._threads:
                        await asyncio.sleep(0.001)
                    await turn.submit(1, admission, until)
        except ServiceError as error:
            return type(error).__name__
        return "answered"

    async def caller(self, patience_s: float, *, says_so: bool) -> None:
        for _ in range(1 + ASK_AGAIN):
            asked = asyncio.create_task(self.ask(patience_s if says_so else None))
            if (await asyncio.wait([asked], timeout=patience_s))[0]:
                self.ends[asked.result()] += 1
                return
            asked.cancel()
            self.ends["left"] += 1

    async def steadily(self, seconds: float) -> None:
        until = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < until:
            await self.ask()

    async def blow(
        self, rate: float, patience_s: Callable[[random.Random], float], *, says_so: bool
    ) -> None:
        """Let callers come for some seconds at a rate, and wait for none of them."""
        until = asyncio.get_running_loop().time() + SECONDS
        callers = set()
        while asyncio.get_running_loop().time() < until:
            await asyncio.sleep(self._chance.expovariate(rate))
            caller = asyncio.create_task(self.caller(patience_s(self._chance), says_so=says_so))
            callers.add(caller)
            caller.add_done_callback(callers.discard)
        for caller in list(callers):
            caller.cancel()


def all_alike(random: random.Random) -> float:
    return 0.05


def spread(random: random.Random) -> float:
    return random.uniform(0.02, 0.08)


def half(random: random.Random) -> float:
    return 0.05 if random.random() < 0.5 else 1.0


def most_at_once(random: random.Random) -> float:
    return 0.002 if random.random() < 0.8 else 30.0


def most_soon(random: random.Random) -> float:
    return 0.012 if random.random() < 0.8 else 30.0


@pytest.mark.parametrize(
    ("times", "patience_s", "says_so", "goodput"),
    [
        (3.0, all_alike, True, 0.9),
        (3.0, all_alike, False, 0.75),
        (1.2, all_alike, True, 0.9),
        pytest.param(*(1.2, all_alike, False, 0.75), marks=pytest.mark.slow),
        pytest.param(*(10.0, all_alike, True, 0.85), marks=pytest.mark.slow),
        (3.0, spread, False, 0.6),
        pytest.param(*(3.0, half, True, 0.9), marks=pytest.mark.slow),
        (3.0, half, False, 0.8),
        pytest.param(*(5.0, most_at_once, False, 0.85), marks=pytest.mark.slow),
        (5.0, most_soon, False, 0.4),
    ],
)
def test_callers_who_do_not_wait_take_little_from_what_can_be_answered(
    times, patience_s, says_so, goodput
):
    async def scenario():
        storm = Storm()
        await asyncio.gather(*(storm.steadily(1.0) for _ in range(MAX_BATCH)))
        capacity = float(storm.computed)
        await storm.blow(times * capacity, patience_s, says_so=says_so)
        storm.running.cancel()
        return storm.ends["answered"] / SECONDS / capacity

    assert in_virtual_time(scenario()) > goodput
