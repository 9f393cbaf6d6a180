"""Batches that pass through graphs one behind the other.

There is no CUDA graph without a GPU: `recorded` stands for it. On the CPU streams and events do
nothing, so order between them is for the tests marked `gpu`; buffers are the same.
"""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.classify import Ranked
from service.engine.graphs import CapturedGraph, CudaCapture
from service.engine.pipeline import Pipeline
from tests.service.recorded import recorded

SIZE = (3, 2)
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def work(pixels: Tensor) -> Ranked:
    """Something of every pixel of an image, in every output."""
    values = pixels.flatten(1).float()
    scores, classes = values.sort(dim=-1, descending=True, stable=True)
    return Ranked(scores, classes.int(), (values.view(-1, 1, *SIZE, 3) + 0.5, values * 2))


def opened(device: str, *, slots: int = 2, buckets: tuple[int, ...] = (1, 2, 4)) -> Pipeline:
    where = torch.device(device)
    capture = recorded if device == "cpu" else CudaCapture(where)
    return Pipeline(where, work, SIZE, buckets, slots=slots, capture=capture)


def images(count: int, seed: int) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), np.uint8))


def assert_of(ranked: Ranked, batch: list[NDArray[np.uint8]], *, explain: bool) -> None:
    expected = work(torch.from_numpy(np.stack(batch)))
    torch.testing.assert_close(ranked.scores, expected.scores)
    torch.testing.assert_close(ranked.classes, expected.classes)
    locations = expected.sampling_locations if explain else ()
    torch.testing.assert_close(ranked.sampling_locations, locations)


@pytest.mark.parametrize("device", DEVICES)
def test_batches_in_flight_do_not_touch_each_other(device):
    pipeline = opened(device)
    for seed in range(20):
        a, b = images(1 + seed % 4, seed), images(1 + seed % 3, 100 + seed)
        first = pipeline.launch(a, explain=True)
        second = pipeline.launch(b, explain=seed % 2 == 0)
        # In either order: a slot is free again when its results are out.
        if seed % 4 < 2:
            assert_of(second(), b, explain=seed % 2 == 0)
            assert_of(first(), a, explain=True)
        else:
            of_a = first()
            third = pipeline.launch(images(4, 200 + seed), explain=True)
            assert_of(second(), b, explain=seed % 2 == 0)
            assert_of(third(), images(4, 200 + seed), explain=True)
            assert_of(of_a, a, explain=True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_buckets_share_the_slots(device):
    pipeline = opened(device, slots=1)
    for count in (4, 1, 3, 2, 4):
        batch = images(count, count)
        assert_of(pipeline.launch(batch, explain=True)(), batch, explain=True)


def test_a_batch_that_fails_gives_its_slot_back():
    healthy = True

    def fragile(work: Any, inputs: tuple[Tensor, ...]) -> CapturedGraph[Any]:
        captured = recorded(work, inputs)

        def replay() -> None:
            if not healthy:
                raise RuntimeError("device")
            captured.replay()

        return CapturedGraph(captured.inputs, captured.outputs, replay)

    pipeline = Pipeline(torch.device("cpu"), work, SIZE, (1,), slots=1, capture=fragile)
    batch = images(1, 1)
    healthy = False
    for _ in range(3):
        with pytest.raises(RuntimeError, match="device"):
            pipeline.launch(batch, explain=False)
    healthy = True
    assert_of(pipeline.launch(batch, explain=True)(), batch, explain=True)
