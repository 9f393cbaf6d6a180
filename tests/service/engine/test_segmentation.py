"""Shapes, graphs and passes of the segmentation engine.

There is no CUDA graph without a GPU, so most tests give the engine `recorded`, which does what a
graph does in its place: it works on static tensors and overwrites its outputs in every replay.
"""

import asyncio
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from model.segmentation import SEGMENTERS, Segmenter, segment
from model.segmentation.config import RATIOS
from model.segmentation.transforms import to_model_pixels
from service.engine.device import Device
from service.engine.items import SegmentationInput, SegmentationOutput, Wanted
from service.engine.segmentation import SegmentationEngine
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from tests import recipe
from tests.model.segmentation.conftest import segmenter_state
from tests.service.recorded import recorded

CONFIG = replace(SEGMENTERS["semantic_fpn_dat_nano"], num_classes=7, scale=(160, 96))
SIZES = [(96, 128), (128, 96)]  # of inputs
IMAGES = {
    (96, 128): [(48, 64), (192, 256), (91, 121), (96, 128)],
    (128, 96): [(64, 48), (256, 192)],
}


def network() -> Segmenter:
    segmenter = Segmenter(CONFIG).eval()
    segmenter.load_state_dict(segmenter_state(CONFIG))
    return segmenter


async def opened(device: str = "cpu", **settings: Any) -> tuple[SegmentationEngine, ModelMetrics]:
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "segment", 1)
    engine = SegmentationEngine(network(), Device(device, threads=1), metrics, **settings)
    await engine.load()
    return engine, metrics


def picture(number: int, size: tuple[int, int]) -> Any:
    return recipe.image(11, number, *size)


def item(number: int, size: tuple[int, int], *, several: bool = False, **wanted: Any) -> Any:
    resizings = [CONFIG.resizing(size, ratio) for ratio in (RATIOS if several else (1.0,))]
    scales = tuple(to_model_pixels(picture(number, size), resizing) for resizing in resizings)
    explained = RATIOS.index(1.0) if several else 0
    return SegmentationInput(scales, size, explained, mirrored=several, **wanted)


def expected(number: int, size: tuple[int, int], *, several: bool = False) -> Any:
    return segment(
        network(),
        picture(number, size),
        ratios=RATIOS if several else (1.0,),
        mirrored=several,
        confidence=True,
    )


def assert_says(output: SegmentationOutput, direct: Any) -> None:
    """Ties may be broken by rounding, which differs with the batch."""
    labels = direct.labels.numpy()
    assert output.finite
    assert output.labels.dtype == np.uint8
    assert (output.labels != labels).mean() < 1e-3
    if output.margins is not None:
        np.testing.assert_allclose(output.margins, direct.margins.numpy() * 255, atol=1.01)
    if output.probabilities is not None:
        sums = np.bincount(labels.ravel(), direct.probabilities.numpy().ravel(), minlength=7)
        np.testing.assert_allclose(output.probabilities, sums, atol=1e-3 * labels.size)


async def test_an_image_is_the_same_alone_and_in_a_graph_of_any_bucket():
    engine, metrics = await opened(buckets=(1, 2, 4), sizes=SIZES, capture=recorded)
    direct = {
        size: [expected(n, image) for n, image in enumerate(images)]
        for size, images in IMAGES.items()
    }
    batches = 0
    # Large before small: rows of an earlier batch stay behind.
    for count in (4, 1, 3, 2):
        for size, images in IMAGES.items():
            some = [
                item(n, image, probabilities=n % 2 == 0, margins=n > 1)
                for n, image in enumerate(images[:count])
            ]
            assert {one.group for one in some} == {some[0].group}
            for output, one, said in zip(
                await engine.run_batch(some), some, direct[size], strict=False
            ):
                assert (output.probabilities is not None) == one.probabilities
                assert (output.margins is not None) == one.margins
                assert_says(output, said)
            batches += 1
    assert metrics.replays["graph"]._value.get() == batches
    assert metrics.replays["eager"]._value.get() == 0
    assert metrics.graphs._value.get() == 6


@pytest.mark.slow
async def test_several_scales_are_passes_through_graphs_of_their_own():
    engine, metrics = await opened(buckets=(1, 2), capture=recorded)
    sizes = [(48, 64), (96, 128)]
    direct = [expected(n, size, several=True) for n, size in enumerate(sizes)]
    some = [
        item(n, size, several=True, margins=True, wanted=Wanted(points=n == 1))
        for n, size in enumerate(sizes)
    ]
    assert some[0].group == some[1].group != item(0, sizes[0]).group
    plain = (await engine.run_batch([item(1, sizes[1], wanted=Wanted(points=True))]))[0]
    for _ in range(3):  # eagerly, and in graphs
        outputs = await engine.run_batch(some)
        for output, said in zip(outputs, direct, strict=True):
            assert_says(output, said)
        assert outputs[0].sampling_locations == ()
        for ours, theirs in zip(
            outputs[1].sampling_locations, plain.sampling_locations, strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        for _ in RATIOS:
            await engine.settle()
    # An image and its mirror image have one graph.
    assert metrics.captures["ok"]._value.get() == len(RATIOS)
    assert metrics.replays["graph"]._value.get() >= 2 * len(RATIOS)


async def test_attention_is_of_the_official_scale():
    engine, _ = await opened()
    cells = ((5, *[0] * 7),)
    asked = {"wanted": Wanted(points=True, attention=(4,)), "cells": cells}
    (plain,) = await engine.run_batch([item(0, (96, 128), **asked)])
    (several,) = await engine.run_batch([item(0, (96, 128), several=True, **asked)])
    (ours,), (theirs,) = several.attention, plain.attention
    np.testing.assert_array_equal(ours.cells, theirs.cells)
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-5)


async def test_what_is_no_number_is_told():
    segmenter = network()
    with torch.no_grad():
        segmenter.decode_head.classes.bias[3] = float("nan")
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "segment", 1)
    engine = SegmentationEngine(segmenter, Device("cpu", threads=1), metrics)
    await engine.load()
    (output,) = await engine.run_batch([item(0, (96, 128))])
    assert not output.finite


async def test_results_outlive_the_next_batch():
    engine, _ = await opened(buckets=(1,), sizes=SIZES[:1], capture=recorded)
    asked = {"margins": True, "wanted": Wanted(points=True)}
    (output,) = await engine.run_batch([item(1, (96, 128), **asked)])
    kept = [output.labels, output.margins, *output.sampling_locations]
    before = [np.copy(part) for part in kept]
    await engine.run_batch([item(2, (96, 128), **asked)])
    for one, other in zip(kept, before, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_batches_in_flight_do_not_touch_each_other():
    engine, _ = await opened(buckets=(2,), sizes=SIZES[:1], capture=recorded)
    batches = [
        [item(1, (48, 64)), item(2, (192, 256))],
        [item(3, (96, 128), several=True)],
        [item(4, (64, 48))],
    ]
    alone = [await engine.run_batch(batch) for batch in batches]
    together = await asyncio.gather(*map(engine.run_batch, batches))
    for ours, theirs in zip(chain(*together), chain(*alone), strict=True):
        assert (ours.labels != theirs.labels).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
async def test_half_precision_says_the_same_of_most_pixels(dtype):
    half, _ = await opened(dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    (output,) = await half.run_batch([item(0, (96, 128))])
    assert (output.labels == expected(0, (96, 128)).labels.numpy()).mean() > 0.8


def test_the_time_of_an_image_grows_with_its_passes_and_its_pixels():
    engine = SegmentationEngine(
        network(),
        Device("cpu", threads=1),
        Metrics(CollectorRegistry()).add_model("m", "1", "segment", 1),
    )
    once, large = item(0, (96, 128)), item(0, (960, 1280))
    assert once.pixels.shape == large.pixels.shape
    assert engine.cost(large) > 10 * engine.cost(once)
    assert engine.cost(item(0, (96, 128), several=True)) > 8 * engine.cost(once)


@pytest.mark.gpu
async def test_cuda_graphs_say_what_the_cpu_says():
    engine, metrics = await opened("cuda", dtype="float32", buckets=(1, 2), sizes=SIZES[:1])
    images = IMAGES[SIZES[0]][:2]
    for several in (False, True, True, True):
        some = [item(n, size, several=several, margins=True) for n, size in enumerate(images)]
        outputs = await engine.run_batch(some)
        for _ in RATIOS:
            await engine.settle()
        for n, (output, size) in enumerate(zip(outputs, images, strict=True)):
            assert_says(output, expected(n, size, several=several))
    assert metrics.replays["graph"]._value.get() >= 1 + 2 * len(RATIOS)
    assert metrics.captures["failed"]._value.get() == 0
