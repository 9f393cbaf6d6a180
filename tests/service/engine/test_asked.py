"""Batches in which some images ask about attention, of some layers each."""

import asyncio
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import nn

from model import create_model
from model.geometry import CHOSEN_QUERIES, MOST_QUERIES
from service.engine.classify import Classify
from service.engine.device import Device
from service.engine.items import Wanted
from service.engine.pipeline import CAPTURE_AFTER, GRAPHS_KEPT, Pipeline
from service.metrics.replica import Metrics
from tests.service.engine.launches import launches
from tests.service.engine.test_classification import forward, inputs, opened
from tests.service.engine.test_detection import inputs as scenes
from tests.service.engine.test_detection import opened as opened_detector
from tests.service.recorded import recorded

# Of each image of a batch; the third does not ask.
LAYERS = [(2, 6), (0,), (), (1, 2, 3, 4)]


def asking(items):
    """Images that ask, each about layers and cells of its own."""
    random = np.random.default_rng(4)
    asked = []
    for row, (item, layers) in enumerate(zip(items, LAYERS, strict=False)):
        own = random.integers(0, 16, (len(layers), MOST_QUERIES)).tolist()
        if row == 1:  # the model chooses
            own = [[-1 - rank for rank in range(CHOSEN_QUERIES)] + [0] * CHOSEN_QUERIES]
        wanted = Wanted(points=bool(layers), attention=layers)
        asked.append(replace(item, wanted=wanted, cells=tuple(map(tuple, own))))
    return asked


def assert_equal(ours, theirs, atol):
    for one, other in zip(ours.attention, theirs.attention, strict=True):
        np.testing.assert_array_equal(one.cells, other.cells)
        np.testing.assert_allclose(one.weights, other.weights, atol=atol)
        # A sum over the queries of up to 1024 cells.
        np.testing.assert_allclose(one.received, other.received, atol=100 * atol)


@pytest.mark.parametrize("threads", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch": 4},
        pytest.param({"buckets": (8,)}, marks=pytest.mark.slow),
        {"buckets": (4,), "capture": recorded},
    ],
)
def test_every_image_gets_the_attention_it_asks_for(threads, settings):
    engine, _ = opened(threads=threads, **settings)
    alone, _ = opened(max_batch=1)
    plain = inputs(4, explain=False)
    asked = asking(plain)
    outputs = forward(engine, asked)
    for item, output, layers in zip(asked, outputs, LAYERS, strict=True):
        (solo,) = forward(alone, [item])
        assert len(output.attention) == len(layers)
        assert bool(output.sampling_locations) == bool(layers)
        assert_equal(output, solo, 1e-5)
    # The answers are those of a batch in which nobody asks: of one thread bit for bit. Several
    # threads may differ in the last bit from one batch to the next, whether anybody asks or not.
    atol = 0 if threads == 1 else 1e-6
    for output, expected in zip(outputs, forward(engine, plain), strict=True):
        np.testing.assert_allclose(output.scores, expected.scores, rtol=0, atol=atol)
        np.testing.assert_array_equal(output.classes, expected.classes)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed")
def test_beside_openvino_torch_answers_those_who_ask():
    engine, _ = opened(backend="openvino", max_batch=4)
    torch_alone, _ = opened(max_batch=4)
    plain = inputs(4, explain=False)
    outputs = forward(engine, asking(plain))
    for output, item in zip(outputs, asking(plain), strict=True):
        (solo,) = forward(torch_alone, [item])
        assert_equal(output, solo, 1e-5)
        np.testing.assert_allclose(output.scores, solo.scores, atol=1e-4)
    others = forward(engine, plain)
    np.testing.assert_array_equal(outputs[2].scores, others[2].scores)


@pytest.mark.slow
def test_graphs_of_attention_are_captured_when_they_come_again_and_used_by_those_who_ask():
    engine, metrics = opened(buckets=(2,), capture=recorded)
    plain = inputs(2, explain=False)
    asked = asking(plain)

    async def run():
        for _ in range(CAPTURE_AFTER + 2):
            await engine.run_batch(plain)
            await engine.settle()
        assert metrics.replays["eager"]._value.get() == 0
        assert metrics.graphs._value.get() == 1
        for _ in range(CAPTURE_AFTER):
            await engine.run_batch(asked)
            assert metrics.graphs._value.get() == 1
        await engine.settle()
        assert metrics.graphs._value.get() == 2
        replayed = metrics.replays["graph"]._value.get()
        outputs = await engine.run_batch(asked)
        assert metrics.replays["graph"]._value.get() == replayed + 1
        assert metrics.replays["eager"]._value.get() == CAPTURE_AFTER
        return outputs

    outputs = asyncio.run(run())
    alone, _ = opened(max_batch=1)
    for output, item in zip(outputs, asked, strict=True):
        assert_equal(output, forward(alone, [item])[0], 1e-5)


async def test_graphs_of_attention_push_out_no_others():
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "classify", 1)

    def work(pixels, layers=()):
        return pixels.float().mean((1, 2, 3)) + sum(layers)

    pipeline = Pipeline(Device("cpu", 1), work, (1,), metrics, capture=recorded)
    image = (np.full((8, 8, 3), 7, np.uint8),)

    async def come_again(layers):
        for _ in range(CAPTURE_AFTER + 1):
            (mean,) = pipeline.launch([image], lambda outputs: [outputs], layers)()
            assert mean.item() == 7 + sum(layers)
            await pipeline.settle()

    await come_again(())
    for layer in range(1, GRAPHS_KEPT + 2):
        await come_again((layer,))
    assert len(pipeline) == metrics.graphs._value.get() == GRAPHS_KEPT + 1
    eager = metrics.replays["eager"]._value.get()
    await come_again(())
    assert metrics.replays["eager"]._value.get() == eager


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_graphs_on_a_gpu_give_the_attention_of_the_cpu(dtype, atol):
    engine, metrics = opened(device="cuda", dtype=dtype, buckets=(4,))
    exact, _ = opened(max_batch=4)
    plain = inputs(4, explain=False)
    # In half precision close cells change places.
    asked = [item for item in asking(plain) if -1 not in np.ravel(item.cells)]

    async def run():
        for _ in range(CAPTURE_AFTER):
            await engine.run_batch(asked)
            await engine.settle()
        assert metrics.graphs._value.get() == 2
        return await engine.run_batch(asked), await engine.run_batch(plain)

    outputs, others = asyncio.run(run())
    for output, theirs in zip(outputs, forward(exact, asked), strict=True):
        for one, other in zip(output.attention, theirs.attention, strict=True):
            np.testing.assert_array_equal(one.cells, other.cells)
            np.testing.assert_allclose(one.weights, other.weights, atol=atol)
    np.testing.assert_array_equal(outputs[0].scores, others[0].scores)


@pytest.mark.parametrize("capture", [None, pytest.param(recorded, marks=pytest.mark.slow)])
async def test_a_detector_gives_every_image_the_attention_it_asks_for(capture):
    engine, _ = await opened_detector(buckets=(4,), capture=capture)
    alone, _ = await opened_detector(max_batch=1)
    plain = [replace(item, wanted=Wanted()) for item in scenes(4)]
    asked = asking(plain)
    for _ in range(CAPTURE_AFTER + 1):
        outputs = await engine.run_batch(asked)
        await engine.settle()
    expected = await engine.run_batch(plain)
    for item, output, ordinary in zip(asked, outputs, expected, strict=True):
        (solo,) = await alone.run_batch([item])
        assert len(output.attention) == len(item.wanted.attention)
        assert_equal(output, solo, 1e-4)
        np.testing.assert_array_equal(output.boxes, ordinary.boxes)
        np.testing.assert_array_equal(output.scores, ordinary.scores)
        assert output.mask_probabilities is not None
        np.testing.assert_array_equal(output.mask_probabilities, ordinary.mask_probabilities)


class Asking(nn.Module):
    """A classifier that is asked about its last layers."""

    def __init__(self, name):
        super().__init__()
        self.classify = Classify(create_model(name), torch.bfloat16)
        last = len(self.classify.model.deformable_layers) - 1
        self.layers = (last - 2, last)

    def forward(self, pixels):
        shape = (len(pixels), len(self.layers), MOST_QUERIES)
        cells = torch.zeros(shape, dtype=torch.int64, device=pixels.device)
        return self.classify(pixels, cells, layers=self.layers)


def sampled(maps, grid, **_):
    """The form of `grid_sample`, whose fake needs a torch that is built for CUDA."""
    assert maps.device == grid.device
    assert maps.dtype == grid.dtype
    return maps.new_empty(*maps.shape[:2], *grid.shape[1:3])


@pytest.mark.parametrize("name", ["dat_tiny_224", "dat_pp_tiny_224"])
def test_attention_waits_for_nothing_on_a_gpu_and_is_in_float32(name, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "grid_sample", sampled)
    module = Asking(name)
    (height, width), layers = module.classify.model.config.image_size, module.layers
    shapes = [
        module.classify.model.deformable_layers[layer].attention.reference_points.shape[:2]
        for layer in layers
    ]
    made, ranked = launches(module, 3, height, width, 3, dtype=torch.uint8)
    assert made
    for (rows, columns), weights in zip(shapes, ranked.attention, strict=True):
        assert weights.weights.dtype == weights.received.dtype == torch.float32
        assert weights.received.shape[2] == weights.weights.shape[3] == rows * columns
        assert all(part.device.type == "cuda" for part in weights)
