"""Device time of classifiers as the service runs them, and in the ways that it does not.

A forward pass, from bytes on the device to ranked classes there: as a captured graph and eagerly,
with the kernels of `model.kernels` and in plain torch, and compiled. Then whole engines, from bytes
on the host to results there. Each figure is printed as one JSON object as soon as it is known, the
most telling ways first. Of detectors only the engines are timed. On a CPU, where nothing is
captured and code is traced but not generated, this is a rehearsal.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.findings import Cases, find, note
from bench.harness import options, time_calls
from bench.open_engine import OpenEngine
from bench.rival import make_pixels
from bench.weights import make_detector, recipe_state
from model import VARIANTS, create_model, kernels
from model.cost import flops
from model.detection import DETECTORS
from service.engine.classify import Classify
from service.engine.device import Device
from service.engine.graphs import Capture, CudaCapture
from service.engine.items import ClassificationInput, DetectionInput
from tests import recipe
from tests.service.recorded import recorded

DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
DETECTOR_SIZE = {"cpu": (192, 320), "cuda": (800, 1344)}  # padded
BATCHES_A_CALL = 8  # of an engine
# Before a time is taken: a device that was idle, while code was compiled, runs at low clocks.
WARM_UP_S = {"cpu": 0.0, "cuda": 0.5}
ENGINE = "engine"


@dataclass(frozen=True)
class Way:
    """One way to run a forward pass.

    Attributes:
        captured: as a CUDA graph, else eagerly.
        fused: with the kernels.
        compiled: by `torch.compile`.
    """

    captured: bool = True
    fused: bool = False
    compiled: bool = False

    @contextmanager
    def switched(self) -> Iterator[None]:
        """What is captured, or runs eagerly, in here runs in this way."""
        with mock.patch.object(kernels, "enabled", self.fused):
            yield


SERVED, BASIS = "graph, kernels", "eager"
WAYS = {
    SERVED: Way(fused=True),
    BASIS: Way(captured=False),
    "graph": Way(),
    "graph, compiled kernels": Way(fused=True, compiled=True),
    "graph, compiled": Way(compiled=True),
}
# What is timed unless asked otherwise, the most telling first; compilation takes minutes.
TIMED = [SERVED, ENGINE, BASIS, "graph"]
# Of one H100 in bfloat16: what a batch of one may take, ms, and images a second of some batch.
TARGETS = {"dat_tiny_224": (0.6, 18_000), "dat_pp_tiny_224": (1.3, 12_000)}
LEAST_GAIN = 3.0  # of a graph over running eagerly, at a batch of one


@cache
def network(name: str, kind: str) -> Classify:
    """A classifier on its device, with random weights."""
    model = create_model(name)
    model.load_state_dict(recipe_state(name))
    return Classify(model, DTYPE[kind]).to(kind).eval()


@torch.inference_mode()
def time_way(name: str, way: Way, batch: int, kind: str, seconds: float) -> float:
    """Seconds of a forward pass."""
    work: Callable[[Tensor], Any] = network(name, kind)
    if way.compiled:
        # A limit on recompilations counts for all networks together.
        torch._dynamo.reset()
        backend = "inductor" if kind == "cuda" else "eager"
        work = torch.compile(work, dynamic=False, backend=backend)
    size = VARIANTS[name].image_size
    pixels = torch.randint(256, (batch, *size, 3), dtype=torch.uint8, device=kind)
    with way.switched():
        if not way.captured:
            return device_seconds(lambda: work(pixels), kind, seconds)
        capture: Capture = CudaCapture(torch.device("cuda:0")) if kind == "cuda" else recorded
        return device_seconds(capture(work, (pixels,)).replay, kind, seconds)


def device_seconds(call: Callable[[], object], kind: str, seconds: float) -> float:
    """Median duration of consecutive calls, by the clock of the device."""
    if kind == "cpu":
        call()
        return median(time_calls(call, seconds))
    groups: list[float] = []

    def timed() -> None:
        # Several between two events, so that the host is ahead of the device.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            call()
        end.record()
        end.synchronize()
        groups.append(1e-3 * start.elapsed_time(end) / 5)

    time_calls(timed, WARM_UP_S[kind])
    groups.clear()
    time_calls(timed, seconds)
    return median(groups)


class Times:
    """Prints the time of each way, and what of it was aimed at."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str, int], float] = {}

    def add(self, name: str, way: str, batch: int, taken: float) -> None:
        """Print one time, seconds."""
        self._seconds[name, way, batch] = taken
        # A detector's is unknown.
        work = flops(VARIANTS[name]) if name in VARIANTS else 0
        note(
            model=name,
            way=way,
            batch=batch,
            ms=round(1e3 * taken, 4),
            images_per_s=round(batch / taken, 1),
            tflops=round(2e-12 * batch * work / taken, 2),
        )

    def judge(self, name: str, way: str) -> None:
        """Print how the times of a way, at all batches, compare with the targets."""
        of_way = {batch: s for (n, w, batch), s in self._seconds.items() if (n, w) == (name, way)}
        alone_ms, rate = TARGETS.get(name, (None, None))
        best = max(batch / seconds for batch, seconds in of_way.items())
        if way == SERVED or way.startswith(ENGINE):
            find(name, f"{way}: images/s, best batch", best, at_least=rate)
        if 1 in of_way and way == SERVED:
            find(name, f"{way}: ms of one image", 1e3 * of_way[1], at_most=alone_ms)
        if 1 in of_way and way == BASIS and (name, SERVED, 1) in self._seconds:
            gain = of_way[1] / self._seconds[name, SERVED, 1]
            find(name, f"{way} / {SERVED}, batch 1", gain, at_least=LEAST_GAIN)


def time_batches(name: str, title: str, chosen: Namespace, times: Times) -> None:
    """Time forward passes of all batches in one way."""
    for batch in chosen.batches:
        taken = time_way(name, WAYS[title], batch, chosen.device, chosen.seconds)
        times.add(name, title, batch, taken)
    times.judge(name, title)


def time_engine(name: str, chosen: Namespace, times: Times) -> None:
    """Time an engine, one batch at a time and with as many as its device takes."""
    device = Device(chosen.device)
    opened, inputs = open_engine(name, device, chosen.batches)
    for title, together in ((ENGINE, 1), (f"{ENGINE}, overlapping", device.depth)):
        for size in chosen.batches:
            call = partial(opened.run_many, inputs[:size], BATCHES_A_CALL, together)
            time_calls(call, WARM_UP_S[chosen.device])
            taken = median(time_calls(call, chosen.seconds))
            times.add(name, title, size, taken / BATCHES_A_CALL)
        times.judge(name, title)
    device.close()


def open_engine(
    name: str, device: Device, batches: Sequence[int]
) -> tuple[OpenEngine, Sequence[Any]]:
    """An engine with a graph for each size of batch, and inputs for the largest."""
    kind = device.torch_device.type
    dtype, most = str(DTYPE[kind]).removeprefix("torch."), max(batches)
    if name in DETECTORS:
        size = DETECTOR_SIZE[kind]
        detector = OpenEngine(make_detector(name), device, dtype, buckets=batches, sizes=[size])
        pictures = (recipe.image(0, index, *size) for index in range(most))
        return detector, [DetectionInput(picture, size, (1.0, 1.0)) for picture in pictures]
    model = deepcopy(network(name, kind).model)  # which an engine on a CPU packs
    inputs = [ClassificationInput(image) for image in make_pixels(name, most)]
    return OpenEngine(model, device, dtype, buckets=batches), inputs


def main() -> None:
    """Time the ways of the command line, one after another; seconds are of one way and batch."""
    chosen = options(
        "bench.graphs",
        __doc__,
        {"ways": [*WAYS, ENGINE]},
        device="cuda",
        models=list(TARGETS),
        batches=[1, 8, 32, 64, 128],
        ways=TIMED,
        seconds=0.4,
    )
    times, cases = Times(), Cases()
    for title in chosen.ways:
        for name in chosen.models:
            with cases.case(name, title):
                if title == ENGINE:
                    time_engine(name, chosen, times)
                else:
                    time_batches(name, title, chosen, times)
    cases.end()


if __name__ == "__main__":
    main()
