"""Several devices in one replica: two engines on the CPU, each with a thread and its weights."""

import asyncio
from collections import Counter
from importlib.util import find_spec

import pytest

from service.engine.device import DeviceUnavailable, open_devices
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


async def test_detectors_run_on_all_devices(server):
    answers = await asyncio.gather(*(over_http(server, [JPEG] * 2) for _ in range(4)))
    found = Counter(
        tuple((one.label, round(one.score, 3)) for one in image.found)
        for answer in answers
        for image in answer.images
    )
    assert list(found.values()) == [8]
    assert min(busy(server, "mask_rcnn_dat_nano")) > 0


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


def test_several_devices_share_the_cores(monkeypatch):
    monkeypatch.setattr("service.engine.device.cores", lambda: 6)
    devices = open_devices("cpu,cpu,cpu")
    assert [device.name for device in devices] == ["cpu:0", "cpu:1", "cpu:2"]
    assert [device.threads for device in devices] == [2, 2, 2]
    for device in devices:
        device.close()


@pytest.mark.parametrize("names", ["cuda", "cuda:0,cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(names, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="cuda:0"):
        open_devices(names)


def test_a_gpu_too_many_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda _: None)
    (first, second) = open_devices("cuda:0,cuda:1")
    assert (first.name, second.name, first.depth) == ("cuda:0", "cuda:1", 2)
    (alone,) = open_devices("auto")
    assert alone.name == "cuda:0"
    with pytest.raises(DeviceUnavailable, match=r"cuda:2.* sees 2 GPUs"):
        open_devices("cuda:0,cuda:2")
