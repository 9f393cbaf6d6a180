"""What a peak of work leaves behind in memory."""

import asyncio
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from bench.load import make_jpeg
from bench.memory import peak, reset_peak, resident
from service import memory
from tests.clients import over_http
from tests.service.commands import run

MIB = 1 << 20
UPLOADS = 12
LARGE_DECODED = 3 * 3000 * 4000
PAGES = LARGE_DECODED // resource.getpagesize()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def large() -> bytes:
    return make_jpeg(3000, 4000, quality=90, seed=0)


def test_memory_that_is_free_goes_back_to_the_system() -> None:
    blocks = [np.ones(MIB // 16, np.uint8) for _ in range(128 * 16)]
    # The last one is still there: the heap cannot shrink from its end.
    del blocks[:-1]
    before = resident()

    memory.give_back()

    assert resident() < before - 96 * MIB


_OVER_A_HEAP = """
import resource
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from service.memory import keep_freed

def work():
    held = [np.ones(1 << 20, np.uint8) for _ in range(58)]
    for _ in range(10):
        np.ones(12 << 20, np.uint8)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_freed()
with ThreadPoolExecutor(1) as thread:
    for _ in range(3):  # until everything has its place
        thread.submit(work).result()
    before = faults()
    thread.submit(work).result()
    print(faults() - before)
"""


def test_work_that_is_done_again_asks_the_system_for_no_memory() -> None:
    command = [sys.executable, "-c", _OVER_A_HEAP]
    faults = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(faults) < 1000  # thousands, where an empty heap goes back


_IN_ALL_THREADS = """
from threading import Barrier
import asyncio
import numpy as np
from bench.memory import resident
from service.engine.device import Device
from service.memory import give_back, keep_freed
from service.open_core import open_workers

def work():
    [np.ones(28 << 20, np.uint8) for _ in range(2)]

def together(_):
    together.started.wait()
    work()

device, workers = Device("cpu", threads=2), open_workers(2)
keep_freed()
together.started = Barrier(2, timeout=60)

def launch():
    together(0)
    return lambda: None

async def on_parts():
    await asyncio.gather(*(device.compute(launch, 60, 1) for _ in range(2)))

for use in (
    lambda: asyncio.run(device.run(work)),
    lambda: asyncio.run(on_parts()),
    lambda: device.lanes.map(together, 2, team=2),  # two lanes, also where others want the cores
    lambda: list(workers.map(together, range(2))),
):
    before = resident()
    for _ in range(2):
        use()
        held = resident() - before
        give_back()
        print(held, resident() - before)
"""


@pytest.mark.slow
def test_what_every_kind_of_thread_kept_goes_back_and_is_kept_again() -> None:
    command = [sys.executable, "-c", _IN_ALL_THREADS]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 8
    for held, left in (map(int, line.split()) for line in lines):
        assert held > 50 * MIB
        assert left < 8 * MIB


_FROM_MANY_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from service.memory import give_back, keep_freed, reach_heap

for _ in range(8):
    reach_heap()
keep_freed()
with ThreadPoolExecutor(4) as pool:
    given = [pool.submit(give_back) for _ in range(100)]
print(sum(one.result() is None for one in given))
"""


def test_versions_that_end_at_the_same_time_free_nothing_twice() -> None:
    command = [sys.executable, "-c", _FROM_MANY_THREADS]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "100\n"


@pytest.mark.parametrize(("busy", "expected"), [(False, True), (True, False)])
async def test_only_a_quiet_process_gives_memory_back(
    busy: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back = asyncio.Event()
    loop, periods = asyncio.get_running_loop(), 0

    def process_time() -> float:
        nonlocal periods
        periods += 1
        return memory._QUIET_CPU_S * periods if busy else 0.0

    monkeypatch.setattr(memory, "_PERIOD_S", 0.001)
    monkeypatch.setattr(memory, "process_time", process_time)
    monkeypatch.setattr(memory, "give_back", lambda: loop.call_soon_threadsafe(given_back.set))
    running = asyncio.create_task(memory.give_back_when_quiet())
    while periods < 10:
        await asyncio.sleep(0.001)
    running.cancel()

    assert given_back.is_set() == expected


@pytest.mark.slow
async def test_a_second_storm_of_large_uploads_takes_no_more_memory_than_the_first(
    server, large
) -> None:
    pid, peaks = server.process.pid, []
    for _ in range(2):
        reset_peak(pid)
        storm = (over_http(server, [large], timeout=60) for _ in range(UPLOADS))
        answers = await asyncio.gather(*storm)
        assert {answer.error for answer in answers} == {None}
        peaks.append(peak(pid))

    assert peaks[1] < peaks[0] + UPLOADS * LARGE_DECODED / 2


@pytest.mark.slow
async def test_a_server_decodes_again_without_asking_the_system_for_memory(server, large) -> None:
    def faults() -> int:
        stat = Path(f"/proc/{server.process.pid}/stat").read_text("ascii")
        return int(stat.rpartition(")")[2].split()[7])

    counted = []
    for _ in range(16):
        before = faults()
        assert (await over_http(server, [large], timeout=60)).error is None
        counted.append(faults() - before)

    assert median(counted[4:]) < PAGES / 4  # the first ones give each decode thread its own


@pytest.mark.slow
def test_an_evaluation_decodes_again_without_asking_the_system_for_memory(tmp_path, large) -> None:
    def faults(images: int) -> int:
        data = tmp_path / str(images) / "star"
        data.mkdir(parents=True)
        for index in range(images):
            (data / f"{index}.jpg").write_bytes(large)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        ended = run("evaluate", "--data", data.parent, "--journal", tmp_path / f"{images}.jsonl")
        assert ended.returncode == 0, ended.stderr
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before

    few, many = 4, 12
    assert faults(many) - faults(few) < (many - few) * PAGES / 4
