import asyncio
from functools import partial

import numpy as np
import torch

from bench import graphs
from bench.report import graphs_tables
from model import kernels
from service.engine.device import Device
from service.engine.engine import EngineInput
from tests.conftest import official_state
from tests.service.recorded import recorded


def test_every_way_is_timed_on_the_same_batch(monkeypatch):
    """On the CPU with what stands for a graph; code is traced but not generated."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(kernels, "enabled", True)
    monkeypatch.setattr(graphs, "recipe_state", official_state)
    loop = asyncio.new_event_loop()
    device = Device("cpu", 1)
    ways, memory = loop.run_until_complete(
        graphs.open_ways("dat_nano", device, "float32", (1,), capture=recorded)
    )
    batch = [EngineInput(np.zeros((128, 128, 3), np.uint8))]
    rows = graphs.compare(ways, batch, rounds=1, seconds=0, loop=loop)
    loop.close()
    device.close()
    assert [row["way"] for row in rows] == list(ways)
    assert rows[0]["way"] == graphs.BASIS
    assert rows[0]["ratio"] == 1
    assert set(memory) < set(ways)
    table = graphs_tables({"memory_mb": memory, "rows": rows})
    assert all(way in table for way in ways)


async def test_a_call_runs_its_batches_as_many_at_a_time_as_the_device_takes():
    running = most = runs = 0

    async def run(_):
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    device = Device("cpu", 1)
    device.depth = 2
    await graphs.Way(device, run, batches=5)([])
    device.close()
    assert (runs, most) == (5, 2)
