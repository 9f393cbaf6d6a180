"""Several devices in one replica: two engines on the CPU, each with a thread and its weights."""

import asyncio
from collections import Counter
from functools import partial
from importlib.util import find_spec
from threading import Barrier, Event

import pytest
import structlog
import torch

from service.cpus import seats
from service.engine.device import Device, DeviceUnavailable, open_devices
from service.errors import EngineUnavailable, OutOfMemory
from tests.clients import JPEG, TRANSPORTS
from tests.detection_clients import over_http
from tests.server import start_server


@pytest.fixture(scope="module")
def server():
    with start_server(
        DAT_ENGINE__DEVICE="cpu,cpu", DAT_ENGINE__THREADS=1, DAT_BATCHING__MAX_BATCH=2
    ) as running:
        yield running


def busy(server, model):
    metrics = server.metrics()
    return [
        metrics[f"dat_device_busy_seconds_total,device=cpu:{index},model={model}"]
        for index in range(2)
    ]


@pytest.mark.parametrize("classify", TRANSPORTS)
async def test_all_devices_serve_and_give_the_same_answers(server, classify):
    before = busy(server, "dat_nano")
    (alone,) = (await classify(server, [JPEG], top_k=12)).results
    answers = await asyncio.gather(
        *(classify(server, [JPEG] * 5, top_k=12, explain="points") for _ in range(8))
    )
    results = [result for answer in answers for result in answer.results]
    assert len(results) == 40
    for result in results:
        assert [label for label, *_ in result.predictions] == [
            label for label, *_ in alone.predictions
        ]
        assert [score for *_, score in result.predictions] == pytest.approx(
            [score for *_, score in alone.predictions], abs=1e-5
        )
    added = [
        after - earlier for after, earlier in zip(busy(server, "dat_nano"), before, strict=True)
    ]
    # Shared about evenly: neither has more than three times what the other has.
    assert 0 < max(added) < 3 * min(added)


@pytest.mark.slow
async def test_detectors_run_on_all_devices(server):
    answers = await asyncio.gather(*(over_http(server, [JPEG] * 2) for _ in range(4)))
    found = Counter(
        tuple((one.label, round(one.score, 3)) for one in image.found)
        for answer in answers
        for image in answer.images
    )
    assert list(found.values()) == [8]
    assert min(busy(server, "mask_rcnn_dat_nano")) > 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed")
async def test_openvino_classifies_on_all_devices(server, tmp_path):
    (expected,) = (await TRANSPORTS[0](server, [JPEG])).results
    with start_server(
        DAT_ENGINE__DEVICE="cpu,cpu",
        DAT_ENGINE__BACKEND="openvino",
        DAT_ENGINE__CACHE=tmp_path,
        DAT_BATCHING__MAX_BATCH=2,
    ) as other:
        answers = await asyncio.gather(*(TRANSPORTS[0](other, [JPEG] * 4) for _ in range(4)))
        for answer in answers:
            for result in answer.results:
                assert result.predictions[0][0] == expected.predictions[0][0]
        assert min(busy(other, "dat_nano")) > 0
    assert list((tmp_path / "openvino").glob("*.xml"))


def test_several_devices_share_the_cores():
    devices = open_devices("cpu,cpu,cpu")
    assert [device.name for device in devices] == ["cpu:0", "cpu:1", "cpu:2"]
    assert [device.threads for device in devices] == [seat.threads for seat in seats(3)]
    for device in devices:
        device.close()


@pytest.mark.parametrize("names", ["cuda", "cuda:0,cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(names, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="cuda:0"):
        open_devices(names)


@pytest.fixture
def two_gpus(monkeypatch):
    """Devices that torch would say are there; nothing runs on them."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("set_device", "set_stream", "Stream", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_too_many_is_refused():
    (first, second) = open_devices("cuda:0,cuda:1")
    assert (first.name, second.name, first.depth) == ("cuda:0", "cuda:1", 2)
    (alone,) = open_devices("auto")
    assert alone.name == "cuda:0"
    with pytest.raises(DeviceUnavailable, match=r"cuda:2.* sees 2 GPUs"):
        open_devices("cuda:0,cuda:2")


@pytest.fixture
def gpu(two_gpus):
    device = Device("cuda:1")
    yield device
    device.close(0.1)


def raising(error):
    def work():
        raise error

    return work


@pytest.fixture(params=["launches", "waits"])
def attempt(request, gpu):
    """Work in the thread that launches, and in the one that waits for results."""

    def launch(work):
        if request.param == "waits":
            return work
        result = work()
        return lambda: result

    return lambda work, limit_s=60.0: gpu.compute(partial(launch, work), limit_s, 1)


async def test_an_error_that_the_device_gets_over_is_only_its_batchs(gpu, attempt, monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.synchronize", asked.append)
    for error in (
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
    ):
        with pytest.raises(type(error)):
            await attempt(raising(error))
    assert asked == 2 * [gpu.torch_device]
    assert gpu.healthy
    assert await attempt(lambda: 1) == 1


async def test_a_device_that_cannot_be_waited_for_after_an_error_is_lost(gpu, attempt, monkeypatch):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr("torch.cuda.synchronize", lambda _: raising(error)())
    with pytest.raises(EngineUnavailable) as lost:
        await attempt(raising(RuntimeError("Triton Error [CUDA]: an illegal memory access")))
    assert lost.value.cause == "lost"
    assert not gpu.healthy
    with pytest.raises(EngineUnavailable):
        await attempt(lambda: 1)


def nested(error, cause):
    """As it comes where the end of a capture fails because of what failed in it."""
    try:
        try:
            raise cause
        finally:
            raise error
    except Exception as both:
        return both


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),  # pinned memory
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        nested(
            torch.AcceleratorError("CUDA error: operation failed due to a previous error"),
            torch.OutOfMemoryError("CUDA out of memory."),
        ),
    ],
)
async def test_memory_that_there_is_none_of_loses_no_device(gpu, attempt, error):
    with pytest.raises(OutOfMemory):
        await attempt(raising(error))
    assert gpu.healthy


async def test_what_hangs_in_either_thread_is_noticed(gpu, attempt):
    go_on = Event()
    watching = asyncio.create_task(gpu.watch())
    try:
        with pytest.raises(EngineUnavailable) as lost:
            await attempt(go_on.wait, 0.3)
        assert lost.value.cause == "hung"
        assert not gpu.healthy
    finally:
        go_on.set()
        watching.cancel()


async def test_the_next_batch_begins_while_results_are_waited_for(gpu):
    begun, go_on = Event(), Event()

    def begin():
        begun.set()
        return lambda: 2

    first = asyncio.create_task(gpu.compute(lambda: lambda: go_on.wait(30), 60.0, 1))
    second = asyncio.create_task(gpu.compute(begin, 60.0, 1))
    await asyncio.sleep(0)
    # The event loop stands still here: one thread gives its work to the other by itself.
    assert begun.wait(30)
    assert not first.done()
    go_on.set()
    assert await asyncio.gather(first, second) == [True, 2]


def warned(open_device):
    with structlog.testing.capture_logs() as lines:
        device = open_device()
    device.close()
    return device.name, [line["reason"] for line in lines if line["log_level"] == "warning"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One with a GPU that torch cannot use, for want of what its test says."""
    sign = tmp_path / "nvidia0"
    sign.touch()
    monkeypatch.setattr("service.engine.gpu._SIGNS", (tmp_path / "other", sign))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return sign


def test_the_cpu_is_taken_with_a_word_where_torch_is_built_for_it(machine, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    name, (reason,) = warned(lambda: Device("auto", threads=1))
    assert name == "cpu:0"
    assert "without CUDA" in reason
    with pytest.raises(DeviceUnavailable, match="without CUDA"):
        Device("cuda")


@pytest.mark.parametrize(
    "init",
    [
        raising(RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")),
        lambda: None,
    ],
)
def test_the_cpu_is_taken_with_a_word_where_torch_cannot_use_the_gpu(machine, monkeypatch, init):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.init", init)
    name, (reason,) = warned(lambda: Device("auto", threads=1))
    assert name == "cpu:0"
    assert "too old" in reason or "no GPU" in reason


def test_the_cpu_is_taken_without_a_word_where_there_is_no_gpu(machine):
    machine.unlink()
    assert warned(lambda: Device("auto", threads=1)) == ("cpu:0", [])
    machine.touch()
    # Nor where it is asked for.
    assert warned(lambda: Device("cpu", threads=1)) == ("cpu:0", [])


async def test_batches_on_parts_of_a_cpu_are_computed_beside_each_other_and_watched():
    device, together, go_on = Device("cpu", 2), Barrier(2, timeout=30), Event()
    watching = asyncio.create_task(device.watch())

    def launch():
        together.wait()
        return lambda: "computed"

    try:
        for _ in range(3):
            both = (device.compute(launch, 60.0, 1) for _ in range(2))
            assert await asyncio.gather(*both) == ["computed", "computed"]
        with pytest.raises(EngineUnavailable) as lost:
            await device.compute(go_on.wait, 0.3, 1)
        assert lost.value.cause == "hung"
        assert not device.healthy
    finally:
        go_on.set()
        watching.cancel()
        device.close()
