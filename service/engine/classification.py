"""One classifier on one device: loaded, warmed up, and run in batches."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from typing_extensions import override

from model.cost import flops
from model.dat import DAT
from model.swin import Swin
from service.engine import bfloat16, gpu
from service.engine.asked import Layers, attention_of
from service.engine.classify import Classify, Ranked
from service.engine.computing import Computing, memory_of
from service.engine.device import Device, DeviceUnavailable
from service.engine.engine import Engine
from service.engine.graphs import Capture, CudaCapture
from service.engine.in_graphs import InGraphs
from service.engine.items import ClassificationInput, ClassificationOutput, Wanted, wanted_of
from service.engine.on_cpu import OnCpu, share, team
from service.engine.openvino import check_available
from service.metrics.model import ModelMetrics
from service.settings.engine import Backend
from service.share import Share

DEFAULT_MAX_BATCH = {"cpu": 8, "cuda": 64}
# Of a batch on CUDA, because the memory of its graphs grows with them: those of 64 images of 384
# pixels a side took 2.3 to 2.8 GB.
DEFAULT_MOST_PIXELS = 64 * 224 * 224


def default_max_batch(kind: str, image_size: tuple[int, int]) -> int:
    """Most images in one batch where nobody says, for images of `(H, W)` pixels."""
    most = DEFAULT_MAX_BATCH[kind]
    if kind == "cpu":
        return most
    height, width = image_size
    return max(1, min(most, DEFAULT_MOST_PIXELS // (height * width)))


class _Runs(Protocol):
    """What runs the batches of a classifier on one kind of device."""

    @property
    def graphs(self) -> int:
        """How many graphs there are."""

    @property
    def graphs_bytes(self) -> int:
        """Memory of the device that the graphs took."""

    def forget(self) -> None:
        """Drop the graphs, and count them no more."""

    def launch(
        self, batch: Sequence[ClassificationInput], wanted: Wanted, cores: int
    ) -> Callable[[], Sequence[Ranked]]:
        """Begin a batch on so many cores; the function returned waits for its end.

        Its results come in parts with at least as many rows as images, in their order.
        """

    def warm_up(self, batch: Sequence[ClassificationInput], wanted: Wanted) -> None:
        """Run a batch that counts nowhere, without attention."""

    async def settle(self) -> None:
        """Work of its own after a batch."""


class ClassificationEngine(Engine):
    """Runs batches of one classifier on a device.

    Args:
        dtype: of the features; `auto` means `gpu.default_dtype`.
        max_batch: most images in one batch; 0 means `default_max_batch`, or the largest
            bucket.
        buckets: batch sizes that the device runs; empty means `default_buckets`.
        backend: what computes on a CPU.
        cache: folder that keeps what OpenVINO compiles; `None` means none.
        compiled: whether `torch.compile` fuses what a graph captures.
        capture: how a graph is captured; `None` means CUDA graphs on CUDA and none elsewhere.

    Raises:
        DeviceUnavailable: `compiled` on a device that captures nothing, or a backend that is not
            installed or not for this device or precision.
    """

    def __init__(
        self,
        model: DAT | Swin,
        device: Device,
        metrics: ModelMetrics,
        *,
        dtype: str = "auto",
        max_batch: int = 0,
        buckets: Sequence[int] = (),
        backend: Backend = "torch",
        cache: Path | None = None,
        compiled: bool = False,
        capture: Capture | None = None,
    ) -> None:
        kind = device.torch_device.type
        if compiled and capture is None and kind == "cpu":
            raise DeviceUnavailable(
                "DAT_ENGINE__COMPILE is for CUDA graphs, and the device is a CPU; leave it out"
            )
        super().__init__(
            device,
            metrics,
            dtype=dtype,
            max_batch=max_batch,
            buckets=buckets,
            default_max_batch=default_max_batch(kind, model.config.image_size),
        )
        if backend == "openvino":
            check_available(device.torch_device, self.dtype)
        self._model: DAT | Swin | None = model
        self._image_size = model.config.image_size
        self._backend = backend
        self._cache = cache
        self._compiled = compiled
        self._capture = capture
        self._runs: _Runs | None = None
        self._team = team(model.config)

    @override
    def share(self, in_flight: int, free: int) -> Share:
        """What the next batch takes of the device; see `on_cpu.share`."""
        whole = super().share(in_flight, free)
        if self._backend == "openvino":
            return whole
        quiet = self._device.lanes.crowd.quiet
        return share(whole, in_flight, free, team=self._team, quiet=quiet)

    @override
    def _blank(self) -> ClassificationInput:
        return ClassificationInput(np.zeros((*self._image_size, 3), np.uint8))

    @override
    def _load(self) -> Generator[None, None, Computing]:
        assert self._model is not None, "the model was unloaded: this is a bug"
        device = self._device.torch_device
        began = perf_counter()
        kernels = gpu.kernels_on(device)
        # OpenVINO rounds what it is given in float32.
        given = torch.float32 if self._backend == "openvino" else self.dtype
        classify = Classify(self._model, given).to(device).eval()
        weights_bytes = memory_of(classify)
        built = perf_counter()
        self._metrics.load_seconds["build"].set(built - began)
        capture = self._capture
        if capture is None and device.type == "cuda":
            capture = CudaCapture(device)
        if device.type == "cpu":
            bfloat16.advise(self.dtype, flops(self._model.config))
        if capture is None:
            self._runs = OnCpu(
                classify,
                self.buckets,
                self._device,
                self._metrics,
                backend=self._backend,
                dtype=self.dtype,
                cache=self._cache,
            )
        else:
            graphs = InGraphs(
                classify,
                self.buckets,
                self._device,
                self._metrics,
                compiled=self._compiled,
                capture=capture,
            )
            self._runs = graphs
            yield from graphs.capture_ahead()
        self._metrics.load_seconds["warmup"].set(perf_counter() - built)
        return Computing(
            device=self._device.name,
            hardware=gpu.describe(device),
            backend="torch.compile" if self._compiled else self._backend,
            dtype=self.dtype,
            kernels=kernels,
            tf32=gpu.tf32(device),
            graphs=self._runs.graphs,
            weights_bytes=weights_bytes,
            graphs_bytes=self._runs.graphs_bytes,
            seconds=perf_counter() - began,
        )

    @override
    def _warm_ups(self) -> Iterator[Callable[[], object]]:
        assert self._runs is not None
        blank = self._blank()
        # On a CPU every part of a batch was computed once when it was traced or compiled.
        captured = len(self.buckets) if self._runs.graphs else 1
        for bucket in self.buckets[: -captured - 1 : -1]:
            run = partial(self._runs.warm_up, [blank] * bucket, Wanted(points=True))
            yield self._pace.timed(run, bucket * blank.pixels.size)

    @override
    def _unload(self) -> None:
        if self._runs is not None:
            self._runs.forget()
        self._runs = self._model = None

    @override
    def launch(
        self, batch: Sequence[ClassificationInput], cores: int | None = None
    ) -> Callable[[], list[ClassificationOutput]]:
        assert self._runs is not None, "the model is not loaded: this is a bug"
        wanted = wanted_of(batch)
        parts = self._runs.launch(batch, wanted, self._device.cores if cores is None else cores)
        return lambda: _split(parts(), batch, wanted.attention)

    @override
    async def settle(self) -> None:
        assert self._runs is not None, "the model is not loaded: this is a bug"
        await self._runs.settle()


def _split(
    parts: Sequence[Ranked], batch: Sequence[ClassificationInput], layers: Layers
) -> list[ClassificationOutput]:
    """The output of each item; the parts have at least as many rows, in their order."""
    outputs: list[ClassificationOutput] = []
    for part in parts:
        scores, classes, logits = (one.numpy() for one in (part.scores, part.classes, part.logits))
        items = batch[len(outputs) : len(outputs) + len(scores)]
        explained = any(item.wanted.points for item in items)
        locations = [layer.numpy() for layer in part.sampling_locations] if explained else []
        outputs += [
            ClassificationOutput(
                scores[row],
                classes[row],
                tuple(layer[row] for layer in locations) if item.wanted.points else (),
                attention_of(item, layers, part.attention, row),
                logits[row] if item.wanted.logits else None,
            )
            for row, item in enumerate(items)
        ]
    return outputs
