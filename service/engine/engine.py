"""One classifier on one device: loaded, warmed up, and run in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cost import flops
from model.dat import DAT
from model.packing import pack
from model.tracing import trace
from service.engine import gpu
from service.engine.classify import Classify, Ranked
from service.engine.computing import Computing, memory_of
from service.engine.device import Device, DeviceUnavailable
from service.engine.graphs import Capture, CudaCapture, choose_buckets, fused, pick_bucket
from service.engine.openvino import OpenVinoClassify, check_available
from service.engine.pipeline import Pipeline
from service.metrics import ModelMetrics
from service.settings import Backend

DEFAULT_MAX_BATCH = {"cpu": 8, "cuda": 64}
# From how many FLOPs of an image on several threads of a CPU compute it faster than one. Below,
# they wait for each other longer than they compute.
TEAM_FLOPS = 500_000_000


@dataclass(frozen=True)
class EngineInput:
    """One image on its way to the device.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes of the model's input size.
        explain: whether its sampling locations are asked for.
    """

    pixels: NDArray[np.uint8]
    explain: bool = False


@dataclass(frozen=True)
class EngineOutput:
    """What the device says of one image.

    Attributes:
        scores: softmax probabilities `(num_classes,)`, float32, best first.
        classes: `(num_classes,)`, int32, the class of each score.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless asked for.
    """

    scores: NDArray[np.float32]
    classes: NDArray[np.int32]
    sampling_locations: tuple[NDArray[np.float32], ...] = ()


class Engine:
    """Runs batches of one classifier on a device.

    Args:
        dtype: of the features; `auto` means `gpu.default_dtype`.
        max_batch: most images in one batch; 0 means `DEFAULT_MAX_BATCH`, or the largest bucket.
        buckets: batch sizes that the device runs; empty means `default_buckets`.
        backend: what computes on a CPU.
        cache: folder that keeps what OpenVINO compiles; `None` means none.
        compiled: whether `torch.compile` fuses what a graph captures.
        capture: how a graph is captured; `None` means CUDA graphs on CUDA and none elsewhere.

    Raises:
        DeviceUnavailable: `compiled` on a device that captures nothing, or a backend that is not
            installed or not for this device or precision.

    Attributes:
        buckets: batch sizes that the device runs, ascending; a batch is padded to the next.
        max_batch: most images in one batch.
        dtype: of the features.
    """

    def __init__(
        self,
        model: DAT,
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
            raise DeviceUnavailable("engine.compile is for CUDA graphs, and the device is a CPU")
        self.dtype = (
            gpu.default_dtype(device.torch_device) if dtype == "auto" else getattr(torch, dtype)
        )
        if backend == "openvino":
            check_available(device.torch_device, self.dtype)
        self.buckets = choose_buckets(
            device.torch_device, buckets, max_batch, DEFAULT_MAX_BATCH[kind]
        )
        self.max_batch = self.buckets[-1]
        self._model = model
        self._device = device
        self._metrics = metrics
        self._image_size = model.config.image_size
        self._backend = backend
        self._cache = cache
        self._compiled = compiled
        self._capture = capture
        self._pipeline: Pipeline[Ranked] | None = None
        self._pace = device.pace()

    async def load(self) -> Computing:
        """Move the model to the device and run every bucket once, on a CPU the largest.

        Raises:
            RuntimeError: the device cannot be used, or a graph cannot be captured.
        """
        return await self._device.run(self._load)

    async def run_batch(self, batch: Sequence[EngineInput]) -> list[EngineOutput]:
        """Classify at most `max_batch` images; what the batcher calls.

        Raises:
            EngineUnavailable: the device is lost.
            OutOfMemory: the batch needs more memory than there is.
            RuntimeError: the device failed.
        """
        pixels = sum(item.pixels.size for item in batch)
        limit_s = self._pace.limit_s(pixels)
        launch = self._pace.timed(lambda: self.launch(batch), pixels)
        return await self._device.compute(lambda: self._pace.timed(launch(), pixels), limit_s)

    async def settle(self) -> None:
        """Nothing is left to do after a batch."""

    async def probe(self) -> None:
        """Run a blank image: a failure is the model's or the device's, not the image's.

        Raises:
            Exception: whatever the device says.
        """
        await self.run_batch([EngineInput(np.zeros((*self._image_size, 3), np.uint8))])

    def _load(self) -> Computing:
        device = self._device.torch_device
        began = perf_counter()
        kernels = gpu.kernels_on(device)
        self._classify = Classify(self._model, self.dtype).to(device).eval()
        weights_bytes = memory_of(self._classify)
        built = perf_counter()
        self._metrics.load_seconds["build"].set(built - began)
        blank = np.zeros((*self._image_size, 3), np.uint8)
        capture = self._capture
        if capture is None and device.type == "cuda":
            capture = CudaCapture(device)
        if capture is not None:
            work = fused(self._classify, len(self.buckets)) if self._compiled else self._classify
            self._pipeline = Pipeline(
                self._device, work, self.buckets, self._metrics, capture=capture
            )
            self._pipeline.capture_ahead([(blank,)])
        else:
            self._staging = torch.zeros((self.max_batch, *self._image_size, 3), dtype=torch.uint8)
            self._compute = self._on_cpu()
        # On a CPU every part of a batch was computed once when it was traced or compiled.
        unused = self.buckets[-1:] if self._pipeline is None else self.buckets
        for bucket in reversed(unused):
            self._pace.timed(partial(self._warm_up, [blank] * bucket), bucket * blank.size)()
        self._metrics.load_seconds["warmup"].set(perf_counter() - built)
        return Computing(
            device=self._device.name,
            hardware=gpu.describe(device),
            backend="torch.compile" if self._compiled else self._backend,
            dtype=self.dtype,
            kernels=kernels,
            tf32=gpu.tf32(device),
            graphs=0 if self._pipeline is None else len(self._pipeline),
            weights_bytes=weights_bytes,
            graphs_bytes=0 if self._pipeline is None else self._pipeline.graphs_bytes,
            seconds=perf_counter() - began,
        )

    def _warm_up(self, images: Sequence[NDArray[np.uint8]]) -> None:
        if self._pipeline is None:
            self._on_staged(images)
        else:
            self._pipeline.warm_up([(image,) for image in images], partial(_wanted, explain=True))

    def _on_cpu(self) -> Callable[[Tensor], Sequence[Ranked]]:
        if self._backend == "openvino":
            threads = self._device.threads
            compiled = OpenVinoClassify(
                self._classify, self._image_size, self.buckets, threads, self._cache
            )
            return lambda pixels: [compiled(pixels)]
        pack(self._classify.model)
        self._team = flops(self._model.config) >= TEAM_FLOPS
        sizes = {
            size
            for bucket in self.buckets
            for size in self._device.lanes.share_sizes(bucket, team=self._team)
        }
        self._graphs: dict[int, Callable[[Tensor], Ranked]] = {
            size: trace(self._classify, self._staging[:size]) for size in sizes
        }
        return self._in_lanes

    def _in_lanes(self, pixels: Tensor) -> list[Ranked]:
        def compute(share: Tensor) -> Ranked:
            return self._graphs[len(share)](share)

        return self._device.lanes.map(
            lambda rows: compute(pixels[rows]), len(pixels), team=self._team
        )

    def launch(self, batch: Sequence[EngineInput]) -> Callable[[], list[EngineOutput]]:
        """Begin a batch, in the thread of the device; the function returned waits for its end."""
        if self._pipeline is not None:
            explain = any(item.explain for item in batch)
            results = self._pipeline.launch(
                [(item.pixels,) for item in batch], partial(_wanted, explain=explain)
            )
            return lambda: _split([_ranked(results())], batch)
        parts = self._on_staged([item.pixels for item in batch])
        self._metrics.real_rows.inc(len(batch))
        self._metrics.padding_rows.inc(pick_bucket(len(batch), self.buckets) - len(batch))
        self._metrics.replays["eager"].inc()
        return lambda: _split(parts, batch)

    def _on_staged(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Ranked]:
        """What a CPU says of images, in parts, each of some rows."""
        bucket = pick_bucket(len(images), self.buckets)
        # Rows past the batch keep what an earlier one left.
        rows = self._staging[:bucket]
        for row, image in zip(rows.numpy(), images, strict=False):
            row[...] = image
        return self._compute(rows)


def _wanted(ranked: Ranked, *, explain: bool) -> list[Tensor]:
    return [ranked.scores, ranked.classes, *(ranked.sampling_locations if explain else ())]


def _ranked(wanted: Sequence[Tensor]) -> Ranked:
    scores, classes, *locations = wanted
    return Ranked(scores, classes, tuple(locations))


def _split(parts: Sequence[Ranked], batch: Sequence[EngineInput]) -> list[EngineOutput]:
    """The output of each item; the parts have at least as many rows, in their order."""
    outputs: list[EngineOutput] = []
    for part in parts:
        scores, classes = part.scores.numpy(), part.classes.numpy()
        items = batch[len(outputs) : len(outputs) + len(scores)]
        explained = any(item.explain for item in items)
        locations = [layer.numpy() for layer in part.sampling_locations] if explained else []
        outputs += [
            EngineOutput(
                scores[row],
                classes[row],
                tuple(layer[row] for layer in locations) if item.explain else (),
            )
            for row, item in enumerate(items)
        ]
    return outputs
