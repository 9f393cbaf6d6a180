"""How CUDA graphs are captured, with what stands for CUDA where there is none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Thread, current_thread
from typing import Any

import pytest
import torch

from service.engine.device import Device
from service.engine.graphs import WARM_UP_RUNS, CudaCapture, default_buckets, fused

MOST_DEVICES = 3


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: "FakeStream") -> None:
        assert self.device == other.device


class FakeCuda:
    """Streams, devices and captures as torch keeps them for each thread; nothing is computed.

    Attributes:
        captures: for each the device and the stream that were current, and the keywords.
        under_way: captures.
        during: called in the middle of each.
    """

    def __init__(self) -> None:
        self.captures: list[tuple[torch.device, FakeStream, dict[str, Any]]] = []
        self.under_way: list[Thread] = []
        self.during: Callable[[], None] = lambda: None
        self._defaults = [FakeStream(torch.device("cuda", n)) for n in range(MOST_DEVICES)]
        self._devices: dict[Thread, int] = {}
        self._streams: dict[tuple[Thread, int], FakeStream] = {}

    def default_stream(self, device: torch.device) -> FakeStream:
        return self._defaults[device.index]

    def current_stream(self, device: torch.device) -> FakeStream:
        return self._streams.get((current_thread(), device.index), self._defaults[device.index])

    def set_device(self, device: torch.device) -> None:
        self._devices[current_thread()] = device.index

    def set_stream(self, stream: FakeStream) -> None:
        self.set_device(stream.device)
        self._streams[current_thread(), stream.device.index] = stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self._devices.get(current_thread(), 0)
        self.set_device(device)
        try:
            yield
        finally:
            self._devices[current_thread()] = before

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream(stream.device)
        with self.device(stream.device):
            self.set_stream(stream)
            try:
                yield
            finally:
                self.set_stream(before)

    @contextmanager
    def graph(self, graph: object, stream: FakeStream, **how: Any) -> Iterator[None]:
        assert not self.under_way, "torch takes one capture at a time"
        self.under_way.append(current_thread())
        with self.stream(stream):
            here = torch.device("cuda", self._devices.get(current_thread(), 0))
            self.captures.append((here, self.current_stream(here), how))
            self.during()
            yield
            self.under_way.pop()


class FakeGraph:
    def replay(self) -> None:
        raise AssertionError("nothing is replayed here")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in (
        "default_stream", "current_stream", "set_device", "set_stream", "device", "stream", "graph",
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: MOST_DEVICES)
    return fake


@pytest.mark.parametrize("index", range(MOST_DEVICES))
def test_all_that_leads_to_a_graph_runs_on_its_device_in_one_stream(cuda, index):
    device = torch.device("cuda", index)
    streams = []
    capture = CudaCapture(device)
    for _ in range(2):
        capture(lambda: streams.append(cuda.current_stream(device)), ())
    assert len(streams) == 2 * (WARM_UP_RUNS + 1)
    (stream,) = set(streams)
    assert stream.device == device
    assert stream is not cuda.default_stream(device)
    assert [captured[:2] for captured in cuda.captures] == 2 * [(device, stream)]
    pools = {how["pool"] for *_, how in cuda.captures}
    assert len(pools) == 1
    assert {how["capture_error_mode"] for *_, how in cuda.captures} == {"thread_local"}
    assert cuda.current_stream(device) is cuda.default_stream(device)


async def test_the_thread_of_a_device_computes_and_captures_in_one_stream(cuda):
    for index in (1, 2):
        device = Device(f"cuda:{index}")
        where = device.torch_device

        def compute_and_capture(where: torch.device = where) -> FakeStream:
            computing = cuda.current_stream(where)
            CudaCapture(where)(lambda: None, (), warm_up_runs=0)
            assert cuda.current_stream(where) is computing
            return computing  # type: ignore[no-any-return]

        computing = await device.run(compute_and_capture)
        assert computing is not cuda.default_stream(where)
        assert cuda.captures[-1][:2] == (where, computing)
        # A second model of the device has the same workspaces.
        assert await device.run(compute_and_capture) is computing
        assert device.close()
    assert len(cuda.captures) == 4


def test_one_capture_at_a_time_in_a_process(cuda):
    go_on, begun = Event(), Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(10)

    cuda.during = wait
    failures = []

    def capture(index: int) -> None:
        try:
            CudaCapture(torch.device("cuda", index))(lambda: None, ())
        except AssertionError as failure:
            failures.append(failure)

    threads = [Thread(target=capture, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
        assert begun.wait(10)
    threads[1].join(0.2)  # as long as it takes to fail
    go_on.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(cuda.captures) == 2


def test_a_capture_that_fails_leaves_the_thread_as_it_was(cuda, monkeypatch):
    device = torch.device("cuda", 1)

    failed_pool = None

    @contextmanager  # type: ignore[untyped-decorator]
    def broken(graph: object, stream: FakeStream, **how: Any) -> Iterator[None]:
        nonlocal failed_pool
        failed_pool = how["pool"]
        # As torch does where the capture cannot be ended: its stream stays the current one.
        cuda.set_stream(stream)
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    capture = CudaCapture(device)
    with pytest.raises(RuntimeError, match="during capture"):
        capture(lambda: None, ())
    assert cuda.current_stream(device) is cuda.default_stream(device)
    # Torch may take the pool for one that is still in use.
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    for _ in range(2):
        capture(lambda: None, ())
    pools = [failed_pool, *(how["pool"] for *_, how in cuda.captures)]
    assert pools[0] is not pools[1] is pools[2]


class Layer(torch.nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.factor


def test_every_bucket_of_every_model_is_compiled(monkeypatch):
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(len(inputs[0]))
        return graph.forward

    limits = torch.compiler.config
    for limit in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"):
        monkeypatch.setattr(limits, limit, getattr(limits, limit))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    buckets = default_buckets(torch.device("cuda"), 12)
    models = 2
    assert models * len(buckets) > limits.recompile_limit
    with torch.inference_mode():
        for model in range(models):
            work = fused(Layer(2 + model), len(buckets))
            for bucket in reversed(buckets):
                work(torch.zeros(bucket, 2))
        assert sorted(compiled) == sorted(models * buckets)
        # One more is not left as it is without a word.
        too_many = (torch.zeros(size, 2) for size in range(100, 120))
        with pytest.raises(Exception, match="recompile_limit"):
            list(map(work, too_many))
