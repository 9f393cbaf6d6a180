"""Shapes, graphs and precision of the detection engine.

There is no CUDA graph without a GPU, so most tests give the engine `recorded`, which does what a
graph does in its place: it works on static tensors and overwrites its outputs in every replay.
"""

import asyncio
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from demo.detection import scenes
from model.detection import load_detector
from service.engine.detection import DetectionEngine
from service.engine.device import Device
from service.engine.graphs import GraphCache
from service.engine.items import DetectionInput, DetectionOutput, Wanted
from service.engine.pipeline import CAPTURE_AFTER
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from service.models.load import BUNDLED
from tests.service.recorded import recorded, replays

SIZES = [(192, 256), (160, 224)]  # padded sizes of the test pictures


async def opened(
    checkpoint: Path = BUNDLED["mask_rcnn_dat_nano"], device: str = "cpu", **settings: Any
) -> tuple[DetectionEngine, ModelMetrics]:
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "detect", 1)
    detector = load_detector(checkpoint).detector
    engine = DetectionEngine(detector, Device(device, threads=1), metrics, **settings)
    await engine.load()
    return engine, metrics


def inputs(count: int, size: tuple[int, int] = SIZES[0], seed: int = 5) -> list[DetectionInput]:
    """Scenes of the demo that are as large as they say once they are padded."""
    height, width = size[0] - 7, size[1] - 3
    padded = np.zeros((count, *size, 3), np.uint8)
    for row in range(count):
        padded[row, :height, :width] = scenes.scene(seed, row, height, width).pixels
    return [
        DetectionInput(pixels, (height, width), (1.0, 1.0), Wanted(points=row % 2 == 1))
        for row, pixels in enumerate(padded)
    ]


def assert_same(ours: DetectionOutput, theirs: DetectionOutput) -> None:
    np.testing.assert_array_equal(ours.classes, theirs.classes)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    assert ours.mask_probabilities is not None
    assert theirs.mask_probabilities is not None
    np.testing.assert_allclose(ours.mask_probabilities, theirs.mask_probabilities, atol=1e-3)
    for points, expected in zip(ours.sampling_locations, theirs.sampling_locations, strict=True):
        np.testing.assert_allclose(points, expected, atol=1e-4)


async def test_an_image_is_the_same_alone_and_in_a_graph_of_any_bucket():
    engine, metrics = await opened(buckets=(1, 2, 4), sizes=SIZES, capture=recorded)
    alone, _ = await opened(max_batch=1)
    images = {size: inputs(4, size) for size in SIZES}
    expected = {size: [alone.launch([image])()[0] for image in images[size]] for size in SIZES}
    assert all(len(outputs[0].scores) for outputs in expected.values())
    # Large before small: rows of an earlier batch stay behind.
    for count in (4, 1, 3, 2):
        for size in SIZES:
            outputs = await engine.run_batch(images[size][:count])
            for ours, theirs in zip(outputs, expected[size], strict=False):
                assert_same(ours, theirs)
    assert metrics.replays["graph"]._value.get() == 8
    assert metrics.replays["eager"]._value.get() == 0
    assert metrics.padding_rows._value.get() == 2
    assert metrics.graphs._value.get() == 6


async def test_results_outlive_the_next_batch():
    engine, _ = await opened(buckets=(2,), sizes=SIZES[:1], capture=recorded)
    _, output = await engine.run_batch(inputs(2, seed=1))
    before = [np.copy(part) for part in (output.boxes, output.scores, *output.sampling_locations)]
    await engine.run_batch(inputs(2, seed=2))
    after = (output.boxes, output.scores, *output.sampling_locations)
    for kept, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(kept, now)


async def test_a_shape_that_comes_again_gets_a_graph_between_batches():
    engine, metrics = await opened(buckets=(1,), capture=recorded)
    batch = inputs(1)
    for _ in range(CAPTURE_AFTER):
        await engine.settle()
        # An answer never waits for the graph of its own shape.
        await engine.run_batch(batch)
        assert metrics.captures["ok"]._value.get() == 0
    await engine.settle()
    assert metrics.graphs._value.get() == 1
    await engine.run_batch(batch)
    assert metrics.captures["ok"]._value.get() == 1
    assert metrics.replays["eager"]._value.get() == CAPTURE_AFTER
    assert metrics.replays["graph"]._value.get() == 1


@given(st.lists(st.integers(0, 9)), st.sets(st.integers(0, 3)))
def test_the_graphs_kept_are_those_ahead_and_those_used_last(uses, ahead):
    kept, after = 3, 2
    cache = GraphCache[int, str](kept=kept, after=after)
    for key in ahead:
        cache.put_ahead(key, f"{key}")
    used: list[int] = []  # on demand, the last at the end
    misses = dict.fromkeys(range(10), 0)
    for key in uses:
        graph = cache.get(key)
        assert graph == (f"{key}" if key in {*ahead, *used} else None)
        if graph is not None:
            if key in used:
                used.remove(key)
                used.append(key)
            continue
        misses[key] += 1
        assert cache.missed(key) is (misses[key] == after)
        if misses[key] == after:
            cache.put(key, f"{key}")
            used.append(key)
            if len(used) > kept:
                misses[used.pop(0)] = 0
    assert len(cache) == len(ahead) + len(used) <= len(ahead) + kept


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_finds_the_same_objects(dtype):
    exact, _ = await opened()
    half, _ = await opened(dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    found = []
    for image in inputs(4, (192, 320)):
        (ours,), (theirs,) = half.launch([image])(), exact.launch([image])()
        assert ours.boxes.dtype == ours.scores.dtype == np.float32
        for box, kind in zip(theirs.boxes[theirs.scores > 0.7], theirs.classes, strict=False):
            near = np.abs(ours.boxes - box).max(1) < 4
            found.append(kind in ours.classes[near])
    # Rounding differs from processor to processor, and one proposal may lose to another.
    assert len(found) > 10
    assert sum(found) >= 0.9 * len(found)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
async def test_batches_in_flight_do_not_touch_each_other(device):
    capture = recorded if device == "cpu" else None
    engine, _ = await opened(
        device=device, dtype="float32", buckets=(2,), sizes=SIZES[:1], capture=capture
    )
    batches = [
        inputs(2, SIZES[0], seed=1),
        inputs(2, SIZES[1], seed=2),
        inputs(1, SIZES[0], seed=3),
    ]
    alone = [await engine.run_batch(batch) for batch in batches]
    for _ in range(1 if device == "cpu" else 20):
        together = await asyncio.gather(*map(engine.run_batch, batches))
        for ours, theirs in zip(chain(*together), chain(*alone), strict=True):
            assert_same(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_cuda_graphs_find_what_the_cpu_finds(dtype):
    engine, metrics = await opened(device="cuda", dtype=dtype, buckets=(1, 2, 4), sizes=SIZES[:1])
    exact, _ = await opened()
    counts = (4, 4, 4, 1, 3, 2)
    for size in SIZES:
        images = inputs(4, size)
        for count in counts:
            outputs = await engine.run_batch(images[:count])
            await engine.settle()
            for ours, image in zip(outputs, images, strict=False):
                (theirs,) = exact.launch([image])()
                sure = theirs.scores > 0.7
                for box, kind in zip(theirs.boxes[sure], theirs.classes[sure], strict=True):
                    near = np.abs(ours.boxes - box).max(1) < 4
                    assert kind in ours.classes[near]
    assert metrics.replays["graph"]._value.get() == len(counts) + replays(counts, (1, 2, 4))
    assert metrics.captures["failed"]._value.get() == 0
