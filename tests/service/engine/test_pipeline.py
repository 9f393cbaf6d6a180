"""Batches that pass through a device one behind the other.

There is no CUDA graph without a GPU: `recorded` stands for it. On the CPU streams and events do
nothing, so order between them is for the tests marked `gpu`; buffers are the same.
"""

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from torch import Tensor

from service.engine.device import Device
from service.engine.graphs import Capture, CapturedGraph, CudaCapture
from service.engine.pipeline import CAPTURE_AFTER, GRAPHS_KEPT, Pipeline
from service.engine.slots import Row, Slot
from service.errors import EngineUnavailable
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from tests.service.recorded import recorded, replays

SIZES = [(3, 2), (5, 4), (1, 7)]
BUCKETS = (1, 2, 4)
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]

Outputs = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


def work(pixels: Tensor, factors: Tensor) -> Outputs:
    """Something of every pixel of an image, in every output."""
    values = pixels.flatten(1).float() * factors.unsqueeze(1)
    ranked, order = values.sort(dim=-1, descending=True, stable=True)
    return ranked, order, (values.view(pixels.shape) + 0.5, values[:, :0])


def everything(outputs: Outputs) -> list[Tensor]:
    return [outputs[0], outputs[1], *outputs[2]]


def first_alone(outputs: Outputs) -> list[Tensor]:
    return [outputs[0]]


def rows(count: int, seed: int, size: tuple[int, int] = SIZES[0]) -> list[Row]:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, *size, 3), np.uint8)
    return [(image, np.array(row + 1, np.float32)) for row, image in enumerate(pixels)]


def metrics() -> ModelMetrics:
    return Metrics(CollectorRegistry()).add_model("m", "1", "classify", 1)


@pytest.fixture(scope="module")
def devices() -> Iterator[Callable[[str], Device]]:
    opened: dict[str, Device] = {}
    yield lambda name: opened.setdefault(name, Device(name, threads=1))
    for device in opened.values():
        device.close()


def opened(
    device: Device, *, capture: Capture | None = None, counts: ModelMetrics | None = None
) -> Pipeline[Outputs]:
    if capture is None:
        where = device.torch_device
        capture = recorded if where.type == "cpu" else CudaCapture(where)
    return Pipeline(device, work, BUCKETS, counts or metrics(), capture=capture)


def assert_of(
    results: Sequence[Tensor],
    batch: list[Row],
    select: Callable[[Outputs], Sequence[Tensor]] = everything,
) -> None:
    pixels, factors = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
    for ours, exact in zip(results, select(work(pixels, factors)), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_in_flight_do_not_touch_each_other(device, devices, ahead):
    pipeline = opened(devices(device))
    if ahead:
        list(pipeline.capture_ahead([rows(1, 0)[0]]))
    for seed in range(20):
        a, b = rows(1 + seed % 4, seed), rows(1 + seed % 3, 100 + seed)
        first = pipeline.launch(a, everything)
        second = pipeline.launch(b, first_alone if seed % 2 else everything)
        # In either order: a slot is free again when its results are out.
        if seed % 4 < 2:
            assert_of(second(), b, first_alone if seed % 2 else everything)
            assert_of(first(), a)
        else:
            of_a = first()
            c = rows(4, 200 + seed)
            third = pipeline.launch(c, everything)
            assert_of(second(), b, first_alone if seed % 2 else everything)
            assert_of(third(), c)
            assert_of(of_a, a)


steps = st.one_of(
    st.tuples(st.just("launch"), st.integers(1, 4), st.sampled_from(SIZES), st.booleans()),
    st.tuples(st.sampled_from(["wait", "leave"]), st.integers(0, 9)),
    st.just(("settle",)),
    st.just(("fail",)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=25))
def test_whatever_becomes_of_batches_their_slots_serve_the_next_ones(devices, taken):
    made: list[Slot] = []

    def counted(where: torch.device) -> Slot:
        made.append(Slot(where))
        return made[-1]

    healthy = True

    def fragile(
        work: Callable[..., Any], inputs: tuple[Tensor, ...], **how: int
    ) -> CapturedGraph[Any]:
        graph = recorded(work, inputs)

        def replay() -> None:
            if not healthy:
                raise RuntimeError("device")
            graph.replay()

        return CapturedGraph(graph.inputs, graph.outputs, replay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.engine.pipeline.Slot", counted)
        pipeline = opened(devices("cpu"), capture=fragile)
        list(pipeline.capture_ahead([rows(1, 0)[0]]))
        under_way: list[Any] = []
        most = 0
        for seed, (step, *how) in enumerate(taken):
            if step == "launch":
                count, size, all_of_it = how
                batch, select = rows(count, seed, size), everything if all_of_it else first_alone
                under_way.append((pipeline.launch(batch, select), batch, select))
                most = max(most, len(under_way))
            elif step == "settle":
                asyncio.run(pipeline.settle())
            elif step == "fail":
                healthy = False
                with pytest.raises(RuntimeError, match="device"):
                    pipeline.launch(rows(1, seed), everything)
                healthy = True
                most = max(most, len(under_way) + 1)
            elif under_way:
                results, batch, select = under_way.pop(how[0] % len(under_way))
                if step == "wait":
                    assert_of(results(), batch, select)
                del results
        assert len(made) == most


async def test_a_wait_that_is_cancelled_leaves_its_slot(devices, monkeypatch):
    made = []
    monkeypatch.setattr(
        "service.engine.pipeline.Slot", lambda where: made.append(Slot(where)) or made[-1]
    )
    device, go_on = devices("cpu"), Event()

    def slow(*inputs: Tensor) -> Outputs:
        go_on.wait()
        return work(*inputs)

    pipeline = Pipeline(device, slow, BUCKETS, metrics(), capture=None)
    for _ in range(3):
        go_on.clear()
        waiting = asyncio.create_task(device.run(lambda: pipeline.launch(rows(2, 1), everything)))
        await asyncio.sleep(0)
        waiting.cancel()
        go_on.set()
        await device.run(lambda: None)  # after it
        await asyncio.sleep(0)
        gc.collect()
    assert len(made) == 1


async def test_a_shape_that_comes_again_gets_a_graph_between_batches(devices):
    counts = metrics()
    pipeline = opened(devices("cpu"), counts=counts)
    batch = rows(3, 1)
    for _ in range(CAPTURE_AFTER):
        await pipeline.settle()
        # An answer never waits for the graph of its own shape.
        assert_of(pipeline.launch(batch, everything)(), batch)
        assert counts.captures["ok"]._value.get() == 0
    await pipeline.settle()
    assert counts.graphs._value.get() == len(pipeline) == 1
    assert_of(pipeline.launch(batch, everything)(), batch)
    assert counts.captures["ok"]._value.get() == 1
    assert counts.replays["eager"]._value.get() == CAPTURE_AFTER
    assert counts.replays["graph"]._value.get() == 1
    # What ran eagerly was padded too: it warmed up for the graph.
    assert counts.padding_rows._value.get() == CAPTURE_AFTER + 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), max_size=12))
def test_which_batches_run_in_graphs(devices, sizes):
    counts = metrics()
    pipeline = opened(devices("cpu"), counts=counts)
    for size in sizes:
        pipeline.launch(rows(size, 1), everything)()
        asyncio.run(pipeline.settle())
    assert counts.replays["graph"]._value.get() == replays(sizes, BUCKETS)
    assert counts.captures["failed"]._value.get() == 0


def test_which_batches_run_in_graphs_by_hand():
    assert replays((4, 4, 4, 1, 3, 2), BUCKETS) == 2


async def test_what_runs_before_a_capture_is_of_its_shape(devices):
    seen = []

    def watched(*inputs: Tensor) -> Outputs:
        seen.append([tuple(one.shape) for one in inputs])
        return work(*inputs)

    def capture(
        work: Callable[..., Any], inputs: tuple[Tensor, ...], *, warm_up_runs: int = 3
    ) -> CapturedGraph[Any]:
        assert warm_up_runs == 0
        assert seen[-1] == [tuple(one.shape) for one in inputs]
        return recorded(work, inputs)

    counts = metrics()
    pipeline = Pipeline(devices("cpu"), watched, BUCKETS, counts, capture=capture)
    for _ in range(CAPTURE_AFTER):
        pipeline.launch(rows(3, 1), everything)()
    await pipeline.settle()
    assert counts.captures["ok"]._value.get() == 1


def test_padding_is_like_an_image_of_the_batch_but_for_its_pixels(devices):
    """What a kernel reads as a size must be one."""
    seen = []

    def watched(pixels: Tensor, factors: Tensor) -> Outputs:
        seen.append(factors.tolist())
        return work(pixels, factors)

    pipeline = Pipeline(devices("cpu"), watched, BUCKETS, metrics(), capture=recorded)
    pipeline.launch(rows(4, 1, SIZES[1]), everything)()  # leaves its pixels behind
    pipeline.launch(rows(3, 1), everything)()
    assert seen == [[1, 2, 3, 4], [1, 2, 3, 1]]


async def test_batches_that_wait_go_between_two_captures(devices):
    device, order = devices("cpu"), []
    begun, go_on = Event(), Event()

    def capture(work: Callable[..., Any], inputs: Any, **how: int) -> CapturedGraph[Any]:
        order.append("capture")
        begun.set()
        go_on.wait()
        return recorded(work, inputs)

    pipelines = [opened(device, capture=capture) for _ in range(2)]
    for pipeline in pipelines:
        for size in SIZES:
            for _ in range(CAPTURE_AFTER):
                pipeline.launch(rows(1, 1, size), everything)()
    settling = [asyncio.create_task(pipeline.settle()) for pipeline in pipelines]
    while not begun.is_set():
        await asyncio.sleep(0.001)
    batch = asyncio.create_task(device.run(lambda: order.append("batch")))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(batch, *settling)
    assert order == ["capture", "batch", "capture"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory for a graph"), EngineUnavailable("gone", "lost")]
)
async def test_a_shape_whose_graph_cannot_be_captured_runs_eagerly(devices, error):
    def refuse(*_: object, **how: int) -> CapturedGraph[Any]:
        raise error

    counts = metrics()
    pipeline = opened(devices("cpu"), capture=refuse, counts=counts)
    for seed in range(CAPTURE_AFTER + 3):
        batch = rows(2, seed)
        assert_of(pipeline.launch(batch, everything)(), batch)
        await pipeline.settle()
    assert counts.captures["failed"]._value.get() == 1
    assert counts.replays["graph"]._value.get() == 0


async def test_graphs_on_demand_are_bounded(devices, monkeypatch):
    monkeypatch.setattr("service.engine.pipeline.GRAPHS_KEPT", 2)
    counts = metrics()
    pipeline = opened(devices("cpu"), counts=counts)
    for side in range(1, 5):
        for _ in range(CAPTURE_AFTER):
            batch = rows(1, side, (side, 3))
            assert_of(pipeline.launch(batch, everything)(), batch)
            await pipeline.settle()
    assert counts.captures["ok"]._value.get() == 4
    assert counts.graphs._value.get() == len(pipeline) == 2 < GRAPHS_KEPT


async def test_without_graphs_nothing_is_captured_or_padded(devices):
    counts = metrics()
    pipeline = Pipeline(devices("cpu"), work, BUCKETS, counts, capture=None)
    list(pipeline.capture_ahead([rows(1, 0)[0]]))
    for seed in range(CAPTURE_AFTER + 1):
        batch = rows(3, seed)
        assert_of(pipeline.launch(batch, everything)(), batch)
        await pipeline.settle()
    assert counts.captures["ok"]._value.get() == len(pipeline) == 0
    assert counts.padding_rows._value.get() == 0
