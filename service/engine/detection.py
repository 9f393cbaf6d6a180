"""One detector on its device: loaded, warmed up, and run in batches of equally large images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from time import perf_counter

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.detection.backbone import Backbone
from model.detection.dense import Candidates
from model.detection.detector import DenseFeatures, Detector
from model.detection.transforms import Normalise
from service.engine.device import CAPTURE_LIMIT_S, Device
from service.engine.engine import DEFAULT_DTYPE
from service.engine.graphs import (
    Capture,
    CapturedGraph,
    CudaCapture,
    GraphCache,
    choose_buckets,
    pick_bucket,
)
from service.errors import EngineFailed, EngineUnavailable
from service.metrics import ModelMetrics

# A batch gains nothing on a CPU, where one large image keeps all cores busy.
DEFAULT_MAX_BATCH = {"cpu": 1, "cuda": 8}
WARM_UP_SIZE = (320, 320)  # pixels
# A capture costs about as much as so many batches, and a graph is paid for in memory.
CAPTURE_AFTER = 2
GRAPHS_KEPT = 16

Size = tuple[int, int]

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DetectionInput:
    """One image on its way to the device.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes, resized and padded.
        resized: `(H, W)` without the padding, pixels.
        scale_xy: by which the image was enlarged.
        explain: whether its sampling locations are asked for.
    """

    pixels: NDArray[np.uint8]
    resized: tuple[int, int]
    scale_xy: tuple[float, float]
    explain: bool = False

    @property
    def padded_size(self) -> tuple[int, int]:
        """`(H, W)` with the padding; only images of one such size may share a batch."""
        height, width, _ = self.pixels.shape
        return height, width


@dataclass(frozen=True)
class DetectionOutput:
    """What the device says of one image.

    Attributes:
        boxes: `(N, 4)`, `(x1, y1, x2, y2)` in pixels of the image.
        scores: `(N,)`, best first.
        classes: `(N,)`, indices.
        mask_probabilities: `(N, 28, 28)` over each box, or `None` from a detector without masks.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless asked for.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    mask_probabilities: NDArray[np.float32] | None
    sampling_locations: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class _Shape:
    """What a graph is captured for."""

    padded_size: Size
    bucket: int


@dataclass(frozen=True)
class _DenseGraph:
    """A graph, and the geometry that it reads: the detector itself forgets sizes after a while."""

    captured: CapturedGraph[DenseFeatures]
    geometry: Backbone


class DetectionEngine:
    """Runs batches of one detector on a device.

    What a detector computes everywhere in an image (`Detector.dense`) has a graph for each shape
    where the device has graphs; what follows depends on what was found. A shape without a graph
    runs eagerly; when it comes again, its graph is captured between two batches.

    Args:
        dtype: of the features; `auto` means `DEFAULT_DTYPE`.
        max_batch: most images in one batch; 0 means `DEFAULT_MAX_BATCH`, or the largest bucket.
        buckets: batch sizes of the graphs; empty means `default_buckets`.
        sizes: padded sizes `(H, W)` that are made ready by `load`, with a graph for each bucket.
        capture: how a graph is captured; `None` means CUDA graphs on CUDA and none elsewhere.

    Attributes:
        buckets: batch sizes of the graphs, ascending; a batch is padded to the next.
        max_batch: most images in one batch.
        dtype: of the features.
    """

    def __init__(
        self,
        detector: Detector,
        device: Device,
        metrics: ModelMetrics,
        *,
        dtype: str = "auto",
        max_batch: int = 0,
        buckets: Sequence[int] = (),
        sizes: Sequence[Size] = (),
        capture: Capture | None = None,
    ) -> None:
        kind = device.torch_device.type
        self.dtype = DEFAULT_DTYPE[kind] if dtype == "auto" else getattr(torch, dtype)
        self.buckets = choose_buckets(
            device.torch_device, buckets, max_batch, DEFAULT_MAX_BATCH[kind]
        )
        self.max_batch = self.buckets[-1]
        self._detector = detector
        self._device = device
        self._metrics = metrics
        self._sizes = tuple(sizes)
        self._capture = capture
        self._graphs = GraphCache[_Shape, _DenseGraph](kept=GRAPHS_KEPT, after=CAPTURE_AFTER)
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._wanted: list[_Shape] = []
        self._pace = device.pace()

    async def load(self) -> None:
        """Move the detector to the device, make its sizes ready and run it once.

        Raises:
            RuntimeError: the device cannot be used, or a graph cannot be captured.
        """
        await self._device.run(self._load)

    async def run_batch(self, batch: Sequence[DetectionInput]) -> list[DetectionOutput]:
        """Detect in at most `max_batch` images of one padded size; what the batcher calls.

        Raises:
            EngineUnavailable: the device is lost.
            OutOfMemory: the batch needs more memory than there is.
            RuntimeError: the device failed.
        """
        pixels = sum(item.pixels.size for item in batch)
        forward = self._pace.timed(lambda: self.forward(batch), pixels)
        return await self._device.run(forward, self._pace.limit_s(pixels))

    async def probe(self) -> None:
        """Run a blank image: a failure is the model's or the device's, not the image's.

        Raises:
            Exception: whatever the device says.
        """
        await self.run_batch([self._blank()])

    async def settle(self) -> None:
        """Capture the graphs that the batch called for: no image waits for a graph of its own.

        Without the graph its shape runs eagerly as before, so a failure is logged and no more.
        """
        while self._wanted:
            shape = self._wanted.pop()
            try:
                await self._device.run(partial(self._capture_on_demand, shape), CAPTURE_LIMIT_S)
            except (RuntimeError, EngineFailed, EngineUnavailable):
                log.exception("no graph", size=shape.padded_size, bucket=shape.bucket)
                self._metrics.captures["failed"].inc()

    def _capture_on_demand(self, shape: _Shape) -> None:
        # In the thread of the device, where a graph that leaves is freed as well.
        before = len(self._graphs)
        self._graphs.put(shape, self._capture_shape(shape))
        self._metrics.graphs.inc(len(self._graphs) - before)

    def _load(self) -> None:
        device = self._device.torch_device
        start = perf_counter()
        self._normalise = Normalise(self.dtype).to(device)
        self._detector.cast(self.dtype).to(device).eval()
        self._metrics.load_seconds["build"].set(perf_counter() - start)
        start = perf_counter()
        if self._capture is None and device.type == "cuda":
            self._capture = CudaCapture(device)
        for size in sorted(self._sizes, reverse=True):
            with torch.inference_mode():
                self._detector.backbone_for(size)
            for bucket in reversed(self.buckets) if self._capture else ():
                shape = _Shape(size, bucket)
                self._graphs.put_ahead(shape, self._capture_shape(shape))
        self._metrics.graphs.inc(len(self._graphs))
        blank = self._blank()
        self._pace.timed(partial(self._run, [blank]), blank.pixels.size)()
        self._metrics.load_seconds["warmup"].set(perf_counter() - start)

    def _blank(self) -> DetectionInput:
        # One of the sizes that are ready: another would push one of them out.
        size = min(self._sizes, default=WARM_UP_SIZE)
        return DetectionInput(np.zeros((*size, 3), np.uint8), size, (1.0, 1.0), explain=True)

    def forward(self, batch: Sequence[DetectionInput]) -> list[DetectionOutput]:
        """Detect in a batch in the calling thread, which must be the device's after `load`."""
        shape = self._shape(batch)
        graph = self._graphs.get(shape)
        outputs = self._run(batch, graph)
        self._metrics.real_rows.inc(len(batch))
        if graph is not None:
            self._metrics.padding_rows.inc(shape.bucket - len(batch))
        elif self._capture is not None and self._graphs.missed(shape):
            self._wanted.append(shape)
        self._metrics.replays["eager" if graph is None else "graph"].inc()
        return outputs

    def _shape(self, batch: Sequence[DetectionInput]) -> _Shape:
        return _Shape(batch[0].padded_size, pick_bucket(len(batch), self.buckets))

    def _capture_shape(self, shape: _Shape) -> _DenseGraph:
        assert self._capture is not None
        device = self._device.torch_device
        pixels = torch.zeros((shape.bucket, *shape.padded_size, 3), dtype=torch.uint8)
        resized = torch.tensor([shape.padded_size] * shape.bucket)
        with torch.inference_mode():
            captured = self._capture(self._dense, (pixels.to(device), resized.to(device)))
        self._metrics.captures["ok"].inc()
        return _DenseGraph(captured, self._detector.backbone_for(shape.padded_size))

    def _dense(self, pixels: Tensor, resized: Tensor) -> DenseFeatures:
        return self._detector.dense(self._normalise(pixels, resized), resized)

    def _run(
        self, batch: Sequence[DetectionInput], graph: _DenseGraph | None = None
    ) -> list[DetectionOutput]:
        device = self._device.torch_device
        with torch.inference_mode():
            pixels = self._stage(batch)
            resized = torch.tensor([item.resized for item in batch])
            scales = torch.tensor([item.scale_xy for item in batch], device=device)
            if graph is None:
                resized = resized.to(device)
                dense = self._dense(pixels.to(device, non_blocking=True), resized)
            else:
                for static, given in zip(graph.captured.inputs, (pixels, resized), strict=True):
                    static[: len(batch)].copy_(given, non_blocking=True)
                graph.captured.replay()
                dense = _rows(graph.captured.outputs, len(batch))
                resized = graph.captured.inputs[1][: len(batch)]
            found = self._detector.find_in(dense, resized, scales).of_images()
            # One copy for the batch, and none where nobody asked.
            explained = (
                [to_host(layer) for layer in dense.sampling_locations]
                if any(item.explain for item in batch)
                else []
            )
        return [
            DetectionOutput(
                one.boxes.numpy(),
                one.scores.numpy(),
                one.labels.numpy(),
                None if one.mask_probabilities is None else one.mask_probabilities.numpy(),
                tuple(layer[row] for layer in explained) if item.explain else (),
            )
            for row, (item, one) in enumerate(zip(batch, found, strict=True))
        ]

    def _stage(self, batch: Sequence[DetectionInput]) -> Tensor:
        """The pixels of a batch in host memory that the device can copy from by itself."""
        shape = (len(batch), *batch[0].pixels.shape)
        needed = prod(shape)
        if needed > len(self._staging):
            on_cuda = self._device.torch_device.type == "cuda"
            self._staging = torch.empty(needed, dtype=torch.uint8, pin_memory=on_cuda)
        staged = self._staging[:needed].view(shape)
        for row, item in zip(staged.numpy(), batch, strict=True):
            row[...] = item.pixels
        return staged


def _rows(dense: DenseFeatures, count: int) -> DenseFeatures:
    """The first images of a batch."""
    boxes, scores, labels, of_levels = dense.candidates
    return DenseFeatures(
        [level[:count] for level in dense.levels],
        Candidates(boxes[:count], scores[:count], labels[:count], of_levels),
        tuple(layer[:count] for layer in dense.sampling_locations),
    )


def to_host(tensor: Tensor) -> NDArray[np.float32]:
    """A host copy that outlives the next replay."""
    host: NDArray[np.float32] = tensor.to("cpu", torch.float32, copy=True).numpy()
    return host
