import asyncio
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor

from demo.evaluate import bundled_model
from demo.train import CONFIG
from demo.views import upload, view
from model import create_model
from model.normalise import Normalise
from service.engine import on_cpu
from service.engine.classification import ClassificationEngine, default_max_batch
from service.engine.device import Device, DeviceUnavailable
from service.engine.graphs import CapturedGraph, default_buckets, pick_bucket
from service.engine.items import ClassificationInput, ClassificationOutput, Wanted
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from service.share import Share
from tests.conftest import official_state
from tests.service.recorded import recorded


@given(st.sets(st.integers(1, 300), min_size=1), st.integers(1, 300))
def test_a_batch_runs_in_the_smallest_bucket_that_holds_it(sizes, size):
    buckets = sorted(sizes | {300})
    bucket = pick_bucket(size, buckets)
    assert bucket >= size
    assert not any(size <= other < bucket for other in buckets)


@given(st.integers(1, 300))
def test_default_buckets_reach_the_largest_batch(max_batch):
    for device in ("cpu", "cuda"):
        buckets = default_buckets(torch.device(device), max_batch)
        assert list(buckets) == sorted(set(buckets))
        assert buckets[0] == 1
        assert buckets[-1] == max_batch
    assert default_buckets(torch.device("cuda"), 64) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert default_buckets(torch.device("cuda"), 7) == (1, 2, 3, 4, 6, 7)
    assert default_buckets(torch.device("cpu"), 3) == (1, 2, 3)


def opened(
    device: str = "cpu", threads: int = 1, **settings: object
) -> tuple[ClassificationEngine, ModelMetrics]:
    model = create_model("dat_nano")
    model.load_state_dict(official_state("dat_nano"))
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "classify", 1)
    engine = ClassificationEngine(model, Device(device, threads), metrics, **settings)  # type: ignore[arg-type]
    asyncio.run(engine.load())
    return engine, metrics


def inputs(count: int, *, explain: bool = True) -> list[ClassificationInput]:
    pixels = np.random.default_rng(1).integers(0, 256, (count, 128, 128, 3), np.uint8)
    return [
        ClassificationInput(image, Wanted(points=explain and bool(row % 2)))
        for row, image in enumerate(pixels)
    ]


def served_demo(device: str, dtype: str) -> ClassificationEngine:
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "classify", 1)
    engine = ClassificationEngine(
        bundled_model(), Device(device, 1), metrics, dtype=dtype, max_batch=8
    )
    asyncio.run(engine.load())
    return engine


def forward(
    engine: ClassificationEngine, batch: list[ClassificationInput]
) -> list[ClassificationOutput]:
    return engine.launch(batch)()


def by_class(output: ClassificationOutput) -> NDArray[np.float32]:
    assert (np.diff(output.scores) <= 0).all()
    assert sorted(output.classes) == list(range(len(output.scores)))
    return output.scores[np.argsort(output.classes)]


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("buckets", [(), (8,), (1, 3, 8)])
def test_a_row_is_the_same_alone_and_in_any_bucket(buckets, threads):
    engine, _ = opened(buckets=buckets, max_batch=8, threads=threads)
    alone, _ = opened(max_batch=1)
    images = inputs(8)
    expected = [forward(alone, [image])[0] for image in images]
    for size in (8, 1, 5, 3, 2, 7):  # large before small: rows of an earlier batch stay behind
        outputs = forward(engine, images[:size])
        assert len(outputs) == size
        for output, solo in zip(outputs, expected, strict=False):
            np.testing.assert_allclose(by_class(output), by_class(solo), atol=1e-6)
            for ours, theirs in zip(
                output.sampling_locations, solo.sampling_locations, strict=True
            ):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("buckets", [(), (4, 8)])
@pytest.mark.parametrize("large", [False, True])
def test_a_row_is_the_same_on_any_part_of_the_cores(monkeypatch, large, buckets):
    monkeypatch.setattr(on_cpu, "WORTH_A_THREAD", 1 if large else inf)
    engine, _ = opened(buckets=buckets, max_batch=8, threads=4)
    alone, _ = opened(max_batch=1)
    images = inputs(8)
    expected = [forward(alone, [image])[0] for image in images]

    async def compute(begin: int, share: Share) -> None:
        batch = images[begin : begin + share.images]
        outputs = await engine.run_batch(batch, share.cores)
        for output, solo in zip(outputs, expected[begin:], strict=False):
            np.testing.assert_allclose(by_class(output), by_class(solo), atol=1e-6)
            assert len(output.sampling_locations) == len(solo.sampling_locations)

    async def beside_each_other() -> None:
        for in_flight in (1, 2, 3, 4, 100):
            free, shares = 4, []
            while (share := engine.share(in_flight, free)).cores <= free:
                shares.append(share)
                free -= share.cores
            assert free == 0
            await asyncio.gather(*(compute(n % 5, share) for n, share in enumerate(shares)))

    asyncio.run(beside_each_other())


@given(st.integers(1, 64), st.integers(1, 32), st.integers(0, 200), st.integers(0, 64))
def test_large_images_share_the_cores_that_are_free(cores, max_batch, in_flight, free):
    whole, free = Share(cores, max_batch), min(free, cores)
    taken = on_cpu.share(whole, in_flight, free, team=18, quiet=True)
    assert 1 <= taken.cores <= max(1, min(18, free))
    assert taken.cores * in_flight <= cores or taken.cores == 1
    assert 1 <= taken.images <= max_batch
    crowded = on_cpu.share(whole, in_flight, free, team=18, quiet=False)
    assert crowded.cores == 1


@given(st.integers(2, 64), st.integers(0, 200))
def test_a_batch_of_small_images_has_all_cores_or_one_beside_other_models(cores, in_flight):
    whole = Share(cores, 8)
    for free in (cores, 0, -cores):
        assert on_cpu.share(whole, in_flight, free, team=1, quiet=True) == whole
    assert on_cpu.share(whole, in_flight, cores - 1, team=1, quiet=True).cores == 1


def test_graphs_are_padded_and_their_buffers_reused():
    engine, metrics = opened(buckets=(1, 4, 8), capture=recorded)
    alone, _ = opened(max_batch=1)
    images = inputs(8)
    expected = [forward(alone, [image])[0] for image in images]
    for size in (8, 1, 5, 3, 2, 7):
        for output, solo in zip(forward(engine, images[:size]), expected, strict=False):
            np.testing.assert_allclose(by_class(output), by_class(solo), atol=1e-6)
            for ours, theirs in zip(
                output.sampling_locations, solo.sampling_locations, strict=True
            ):
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert metrics.replays["graph"]._value.get() == 6
    assert metrics.graphs._value.get() == metrics.captures["ok"]._value.get() == 3


@pytest.mark.parametrize("capture", [None, recorded])
def test_logits_are_those_of_the_network_where_they_are_wanted(capture):
    engine, _ = opened(capture=capture, max_batch=4)
    network = create_model("dat_nano")
    network.load_state_dict(official_state("dat_nano"))
    plain = inputs(3)
    batch = [replace(item, wanted=replace(item.wanted, logits=row != 1)) for row, item in
             enumerate(plain)]  # fmt: skip
    pixels = torch.from_numpy(np.stack([item.pixels for item in batch]))
    with torch.inference_mode():
        expected = network.eval()(Normalise()(pixels)).numpy()
    for row, output in enumerate(forward(engine, batch)):
        if row == 1:
            assert output.logits is None
        else:
            np.testing.assert_allclose(output.logits, expected[row], atol=1e-4)
    assert all(output.logits is None for output in forward(engine, plain))


@pytest.mark.parametrize("broken", [1, 4, 8])
def test_every_graph_has_run_before_the_engine_is_ready(broken):
    def fragile(work: Any, static: tuple[Tensor, ...], **how: int) -> CapturedGraph[Any]:
        graph = recorded(work, static)

        def replay() -> None:
            if len(static[0]) == broken:
                raise RuntimeError("cannot run")
            graph.replay()

        return CapturedGraph(graph.inputs, graph.outputs, replay)

    with pytest.raises(RuntimeError, match="cannot run"):
        opened(buckets=(1, 4, 8), capture=fragile)


@pytest.mark.parametrize("capture", [None, recorded])
def test_results_outlive_the_next_batch(capture):
    engine, _ = opened(capture=capture)
    images = inputs(2)
    first = forward(engine, images[:1])[0].scores
    before = first.copy()
    forward(engine, images[1:])
    np.testing.assert_array_equal(first, before)


def test_locations_are_given_to_those_who_asked():
    engine, _ = opened()
    plain, explained = forward(engine, inputs(2))
    assert plain.sampling_locations == ()
    layers = create_model("dat_nano").deformable_layers
    assert [points.shape for points in explained.sampling_locations] == [
        (layer.attention.offset_groups, *layer.attention.reference_points.shape) for layer in layers
    ]


def test_padding_is_counted():
    engine, metrics = opened(buckets=(4, 8))
    forward(engine, inputs(3))
    forward(engine, inputs(8))
    assert metrics.real_rows._value.get() == 11
    assert metrics.padding_rows._value.get() == 1
    assert metrics.replays["eager"]._value.get() == 2


@pytest.mark.slow
def test_bfloat16_agrees_on_cpu():
    images = inputs(4)
    exact, _ = opened()
    half, _ = opened(dtype="bfloat16")
    for ours, theirs in zip(forward(half, images), forward(exact, images), strict=True):
        assert np.abs(by_class(ours) - by_class(theirs)).max() < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(DeviceUnavailable, match="cuda"):
        opened(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_give_what_the_cpu_gives(dtype):
    tolerance = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}[dtype]
    engine, metrics = opened(device="cuda", dtype=dtype, buckets=(1, 4, 8))
    exact, _ = opened()
    images = inputs(8)
    expected = forward(exact, images)
    for size in (8, 1, 5, 3, 2, 7):
        outputs = asyncio.run(engine.run_batch(images[:size]))
        for output, solo in zip(outputs, expected, strict=False):
            assert np.abs(by_class(output) - by_class(solo)).max() < tolerance
            for ours, theirs in zip(
                output.sampling_locations, solo.sampling_locations, strict=True
            ):
                assert np.abs(ours - theirs).max() < 20 * tolerance
    assert metrics.replays["graph"]._value.get() == 6
    assert metrics.replays["eager"]._value.get() == 0


@pytest.mark.gpu
def test_models_on_all_gpus_do_not_touch_each_other():
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] * 2
    engines = [opened(device=name, dtype="float32", buckets=(1, 3))[0] for name in names]
    exact, _ = opened()
    images = inputs(6)
    expected = forward(exact, images)

    async def classify(engine: ClassificationEngine, start: int) -> None:
        outputs = await engine.run_batch(images[start : start + 3])
        for ours, theirs in zip(outputs, expected[start:], strict=False):
            np.testing.assert_allclose(by_class(ours), by_class(theirs), atol=1e-4)

    async def all_at_once() -> None:
        await asyncio.gather(*(classify(engine, 3 * n) for engine in engines for n in range(2)))

    for _ in range(20):
        asyncio.run(all_at_once())


@pytest.mark.slow
def test_compiled_graphs_give_what_plain_ones_give(monkeypatch):
    """Traced as for the GPU; code is not generated, which takes a minute on a CPU."""
    traced = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    engine, metrics = opened(buckets=(2,), capture=recorded, compiled=True)
    plain, _ = opened(max_batch=2)
    for output, expected in zip(forward(engine, inputs(2)), forward(plain, inputs(2)), strict=True):
        np.testing.assert_allclose(by_class(output), by_class(expected), atol=1e-5)
    assert metrics.graphs._value.get() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_names_the_classes_of_float32_on_the_device(dtype):
    engine = served_demo("cuda", dtype)
    exact = served_demo("cpu", "float32")
    views = [view(*upload(11, index, 320), CONFIG) for index in range(400)]
    images = [ClassificationInput(one.pixels) for one in views]
    same = [
        ours.classes[0] == theirs.classes[0]
        for start in range(0, len(images), 8)
        for ours, theirs in zip(
            forward(engine, images[start : start + 8]),
            forward(exact, images[start : start + 8]),
            strict=True,
        )
    ]
    assert np.mean(same) >= 0.99


@pytest.mark.gpu
def test_compiled_graphs_give_what_the_cpu_gives():
    engine, _ = opened(device="cuda", dtype="float32", buckets=(2,), compiled=True)
    exact, _ = opened(max_batch=2)
    for output, expected in zip(forward(engine, inputs(2)), forward(exact, inputs(2)), strict=True):
        np.testing.assert_allclose(by_class(output), by_class(expected), atol=1e-4)


def test_there_is_nothing_to_compile_without_graphs():
    with pytest.raises(DeviceUnavailable, match="DAT_ENGINE__COMPILE is for CUDA graphs"):
        opened(compiled=True)


def test_a_batch_of_larger_images_has_fewer_of_them_on_cuda():
    assert default_max_batch("cuda", (224, 224)) == default_max_batch("cuda", (128, 128)) == 64
    assert default_max_batch("cuda", (384, 384)) == 21
    assert default_max_batch("cuda", (4096, 4096)) == 1
    assert default_max_batch("cpu", (384, 384)) == 8
