"""Whatever is killed, each image is answered once, and is counted as it was answered."""

import asyncio
import random
from collections import Counter
from itertools import pairwise

import pytest

from tests.clients import JPEG, eventually, over_http
from tests.endurance.mixed_load import CONNECTION_LOST, MixedLoad
from tests.faults import faulty
from tests.processes import children, kill
from tests.server import RunningServer
from tests.tallies import (
    assert_no_step_back,
    counters,
    in_flight,
    outcomes,
)

MANY = {
    "DAT_SERVER__FRONT_ENDS": 2,
    "DAT_ENGINE__DEVICE": "cpu,cpu",
    "DAT_LIMITS__DEFAULT_TIMEOUT_S": 100,
}
ROUNDS, ROUND_S, PAUSE_S = 3, 12.0, 3.0


async def kills(server: RunningServer, seconds: float, kind: str, seed: int) -> int:
    """Kill processes of a kind at random, and say how many."""
    chance, end, killed = random.Random(seed), asyncio.get_running_loop().time() + seconds, 0
    while asyncio.get_running_loop().time() < end:
        await asyncio.sleep(PAUSE_S * (0.5 + chance.random()))
        there = sorted(name for name in children(server) if name.startswith(kind))
        if there:
            kill(server, chance.choice(there))
            killed += 1
    return killed


@pytest.mark.parametrize("kind", ["worker", "front-end"])
async def test_each_image_is_answered_once_and_counted_once(tmp_path, figures, kind):
    with faulty(tmp_path, **MANY) as running:
        server = running.server
        golden = await over_http(server, [JPEG])
        before, counted, seen = counters(server), outcomes(server), [counters(server)]
        load = MixedLoad(server, seed=1)

        async def scrape() -> None:
            while True:
                seen.append(await asyncio.to_thread(counters, server))
                await asyncio.sleep(0.5)

        scraping = asyncio.create_task(scrape())
        loading = asyncio.create_task(load.run(8, ROUND_S))
        killed = await kills(server, ROUND_S, kind, seed=2)
        await loading
        scraping.cancel()
        await eventually(lambda: in_flight(server) == 0, 60)
        for earlier, later in pairwise(seen):
            assert_no_step_back(earlier, later)
        assert_no_step_back(before, counters(server))
        told, after = load.told, outcomes(server) - counted
        figures(killed=killed, sent=load.sent, told=dict(told), left=load.left, counted=dict(after))
        assert killed >= 2
        assert load.sent == sum(told.values()) + load.left
        lost = told.pop(CONNECTION_LOST, 0)
        unknown = load.left + lost
        # Whoever left may have been answered as well, or have left before anybody saw the request;
        # whose front end was killed may have been counted as answered, or not at all.
        for code in told.keys() | after.keys():
            assert told[code] <= after[code] <= told[code] + unknown, code
        assert sum(told.values()) <= sum(after.values()) <= load.sent
        if kind == "worker":
            assert lost == 0
            assert set(told) <= {"ok", "invalid_image", "worker_lost", "overloaded"}
        waiting = Counter({n: v for n, v in server.metrics().items() if "_waiting," in n})
        assert waiting.total() == 0
        async with asyncio.timeout(60):
            while (again := await over_http(server, [JPEG])).error is not None:
                await asyncio.sleep(0.1)
        assert again.results[0].predictions == golden.results[0].predictions
