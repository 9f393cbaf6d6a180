"""A model is loaded beside the batches of others, and leaves nothing behind when it is unloaded."""

import asyncio
import gc
import weakref
from collections.abc import Generator
from threading import Event, current_thread
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from torch import nn

from service.engine import classification, detection
from service.engine.device import Device
from service.engine.items import ClassificationInput, DetectionInput
from service.errors import OutOfMemory
from service.metrics.replica import Metrics
from service.models.lineup import ModelEntry
from service.open_model import OpenModel, Shared, open_model
from service.settings.settings import Settings
from tests.clients import eventually


async def test_batches_are_run_while_a_model_is_loaded():
    device, held = Device("cpu", 1), Event()

    def load() -> Generator[None, None, str]:
        held.wait()
        yield
        return current_thread().name

    loading = asyncio.create_task(device.load(load))
    for _ in range(3):
        assert await device.run(lambda: current_thread().name) == "engine cpu:0"
    assert not loading.done()
    held.set()
    assert await loading == "loader cpu:0"
    assert device.close()


async def test_where_one_thread_does_both_what_waits_goes_before_the_next_step():
    device = Device("cpu", 1)
    device._loader = device._worker  # as on CUDA
    done: list[str] = []
    first = Event()

    def load() -> Generator[None, None, None]:
        first.wait()
        for step in range(3):
            done.append(f"step {step}")
            yield

    loading = asyncio.create_task(device.load(load))
    await asyncio.sleep(0)
    batch = asyncio.create_task(device.run(lambda: done.append("batch")))
    await asyncio.sleep(0)
    first.set()
    await asyncio.gather(loading, batch)
    assert done == ["step 0", "batch", "step 1", "step 2"]
    assert device.close()


async def test_a_model_for_which_there_is_no_memory_leaves_the_device_as_it_was():
    device = Device("cpu", 1)

    def load() -> Generator[None, None, None]:
        yield
        raise MemoryError

    with pytest.raises(OutOfMemory):
        await device.load(load)
    assert device.healthy
    assert await device.run(lambda: 1) == 1
    assert device.close()


def modules_of(opened: OpenModel) -> list["weakref.ref[nn.Module]"]:
    """Everything that the networks of a model are made of."""
    (engine,) = opened.engines
    assert isinstance(engine, classification.ClassificationEngine | detection.DetectionEngine)
    network: Any = (
        engine._model
        if isinstance(engine, classification.ClassificationEngine)
        else engine._network
    )
    return [weakref.ref(module) for module in network.modules()]


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("dat_nano", ClassificationInput(np.zeros((128, 128, 3), np.uint8))),
        (
            "mask_rcnn_dat_nano",
            DetectionInput(np.zeros((320, 320, 3), np.uint8), (320, 320), (1.0, 1.0)),
        ),
    ],
)
async def test_what_is_unloaded_is_gone(name: str, item: Any):
    """Even where the collector of garbage looks at nothing, as after the start of a server."""
    registry, device = CollectorRegistry(), Device("cpu", 1)
    shared = Shared(Settings(), [device], Metrics(registry))
    opened = open_model(ModelEntry(name=name), shared)
    await opened.load()
    gc.collect()
    gc.freeze()
    try:
        opened.batcher.open()
        running = asyncio.create_task(opened.batcher.run())
        with opened.batcher.admit(1) as admission:
            deadline = asyncio.get_running_loop().time() + 60
            await opened.batcher.submit(item, admission, deadline)
        modules = modules_of(opened)
        assert len(modules) > 50
        labels = {"model": name, "device": "cpu:0", "part": "weights"}
        assert registry.get_sample_value("dat_model_memory_bytes", labels)
        opened.batcher.begin_drain()
        await running
        await opened.close()
        opened.metrics.forget()
        del opened
        await eventually(lambda: not any(module() is not None for module in modules), 5)
        assert registry.get_sample_value("dat_model_memory_bytes", labels) == 0
    finally:
        gc.unfreeze()
    assert device.close()
