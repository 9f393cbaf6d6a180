"""Memory, descriptors and threads of each process under mixed traffic; and a leak that is seen."""

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import pytest

from tests.clients import JPEG, eventually, over_http
from tests.endurance.mixed_load import CONNECTION_LOST, MixedLoad
from tests.faults import faulty
from tests.processes import children, open_files, resident_bytes, threads
from tests.server import RunningServer
from tests.tallies import in_flight, outcomes

CALLERS = 6
# Before that, pools and caches grow to the size that the traffic needs.
WARM_S = 15.0
SAMPLE_S = 1.0
# By which memory may grow, bytes in a thousand requests: allocators are not that exact.
ALLOWED = 2 << 20


@dataclass
class Samples:
    """Memory of each process by how many requests had been sent.

    Attributes:
        of: for each process points `(requests, bytes)`.
    """

    of: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, server: RunningServer, sent: int) -> None:
        for name, pid in ({"first": server.process.pid} | children(server)).items():
            self.of[name].append((sent, resident_bytes(pid)))

    def slopes(self) -> dict[str, float]:
        """Bytes in a thousand requests: the median over all pairs of points (Theil and Sen)."""
        return {
            name: 1000 * median(
                (later - earlier) / (after - before)
                for (before, earlier), (after, later) in combinations(points, 2)
                if after > before
            )
            for name, points in self.of.items()
        }  # fmt: skip


async def soak(
    server: RunningServer, load: MixedLoad, seconds: float, warm_s: float = WARM_S
) -> Samples:
    """Send mixed traffic and take samples of memory, once it is warm."""
    samples = Samples()
    loading = asyncio.create_task(load.run(CALLERS, warm_s + seconds))
    await asyncio.sleep(warm_s)
    while not loading.done():
        await asyncio.to_thread(samples.take, server, load.sent)
        await asyncio.sleep(SAMPLE_S)
    await loading
    return samples


@pytest.mark.timeout(0)
async def test_memory_stays_under_mixed_traffic(tmp_path, shape, figures, request):
    with faulty(tmp_path, DAT_ENGINE__HANG_TIMEOUT_S=100, **shape) as running:
        server = running.server
        golden = await over_http(server, [JPEG])
        counted, load = outcomes(server), MixedLoad(server, seed=3)
        began = time.monotonic()
        samples = await soak(server, load, request.config.getoption("--soak-seconds"))
        seconds = time.monotonic() - began
        await eventually(lambda: in_flight(server) == 0, 60)
        pids = [server.process.pid, *children(server).values()]
        slopes = {name: round(slope) for name, slope in samples.slopes().items()}
        after = outcomes(server) - counted
        figures(
            bytes_in_a_thousand_requests=slopes,
            requests_per_s=load.sent / seconds,
            told=dict(load.told),
            left=load.left,
            files=sum(map(open_files, pids)),
            threads=sum(map(threads, pids)),
        )
        assert max(slopes.values()) < ALLOWED
        assert load.told[CONNECTION_LOST] == 0
        assert set(load.told) <= {"ok", "invalid_image", "overloaded", "deadline_exceeded"}
        assert sum(load.told.values()) <= sum(after.values()) <= load.sent
        again = await over_http(server, [JPEG])
        assert again.results[0].predictions == golden.results[0].predictions


@pytest.mark.timeout(0)
async def test_a_process_that_leaks_is_found(tmp_path, shape, figures):
    """What shows nothing here would show nothing above either."""
    with faulty(tmp_path, DAT_ENGINE__HANG_TIMEOUT_S=100, **shape) as running:
        with running.fault("leak"):
            load = MixedLoad(running.server, seed=3)
            samples = await soak(running.server, load, seconds=12, warm_s=5)
        slopes = samples.slopes()
        figures(bytes_in_a_thousand_requests=slopes)
        leaking = {name for name, slope in slopes.items() if slope >= ALLOWED}
        assert leaking == {"worker-0" if shape else "first"}
