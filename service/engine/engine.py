"""One model on its device: loaded, warmed up, and run in batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.dat import DAT, Explained
from model.transforms import Normalise
from service.engine.device import Device
from service.engine.graphs import (
    Capture,
    CapturedGraph,
    CudaCapture,
    choose_buckets,
    pick_bucket,
)
from service.metrics import ModelMetrics

DEFAULT_MAX_BATCH = {"cpu": 8, "cuda": 64}
DEFAULT_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


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
        scores: softmax probabilities `(num_classes,)`, float32.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless asked for.
    """

    scores: NDArray[np.float32]
    sampling_locations: tuple[NDArray[np.float32], ...] = ()


class Classify(nn.Module):
    """The whole work of the device: bytes to probabilities and sampling locations."""

    def __init__(self, model: DAT, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalise = Normalise(dtype)
        self.model = model.cast(dtype)

    def forward(self, pixels: Tensor) -> Explained:
        """Probabilities `(B, num_classes)`, float32, of RGB bytes `(B, H, W, 3)`."""
        logits, locations = self.model.forward_explained(self.normalise(pixels))
        return Explained(logits.softmax(-1, dtype=torch.float32), locations)


class Engine:
    """Runs batches of one classifier on a device.

    Args:
        dtype: of the features; `auto` means `DEFAULT_DTYPE`.
        max_batch: most images in one batch; 0 means `DEFAULT_MAX_BATCH`, or the largest bucket.
        buckets: batch sizes that the device runs; empty means `default_buckets`.
        capture: how a graph is captured; `None` means CUDA graphs on CUDA and none elsewhere.

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
        capture: Capture | None = None,
    ) -> None:
        kind = device.torch_device.type
        self.dtype = DEFAULT_DTYPE[kind] if dtype == "auto" else getattr(torch, dtype)
        self.buckets = choose_buckets(
            device.torch_device, buckets, max_batch, DEFAULT_MAX_BATCH[kind]
        )
        self.max_batch = self.buckets[-1]
        self._model = model
        self._device = device
        self._metrics = metrics
        self._image_size = model.config.image_size
        self._capture = capture
        self._graphs: dict[int, CapturedGraph[Explained]] = {}

    async def load(self) -> None:
        """Move the model to the device and run every bucket once.

        Raises:
            RuntimeError: the device cannot be used, or a graph cannot be captured.
        """
        await self._device.run(self._load)

    async def run_batch(self, batch: Sequence[EngineInput]) -> list[EngineOutput]:
        """Classify at most `max_batch` images; what the batcher calls.

        Raises:
            RuntimeError: the device failed.
        """
        return await self._device.run(lambda: self.forward(batch))

    def _load(self) -> None:
        device = self._device.torch_device
        # Rows past a batch keep what an earlier one left.
        self._staging = torch.zeros(
            (self.max_batch, *self._image_size, 3),
            dtype=torch.uint8,
            pin_memory=device.type == "cuda",
        )
        start = perf_counter()
        self._classify = Classify(self._model, self.dtype).to(device).eval()
        self._metrics.load_seconds["build"].set(perf_counter() - start)
        start = perf_counter()
        with torch.inference_mode():
            capture = self._capture
            if capture is None and device.type == "cuda":
                capture = CudaCapture(device)
            if capture is not None:
                for bucket in reversed(self.buckets):
                    pixels = self._staging[:bucket].to(device, copy=True)
                    self._graphs[bucket] = capture(self._classify, (pixels,))
                    self._metrics.captures["ok"].inc()
                self._metrics.graphs.set(len(self._graphs))
            blank = EngineInput(np.zeros((*self._image_size, 3), np.uint8), explain=True)
            for bucket in reversed(self.buckets):
                self._run([blank] * bucket)
        self._metrics.load_seconds["warmup"].set(perf_counter() - start)

    def forward(self, batch: Sequence[EngineInput]) -> list[EngineOutput]:
        """Classify a batch in the calling thread, which must be the device's after `load`."""
        bucket = pick_bucket(len(batch), self.buckets)
        with torch.inference_mode():
            outputs = self._run(batch)
        self._metrics.real_rows.inc(len(batch))
        self._metrics.padding_rows.inc(bucket - len(batch))
        self._metrics.replays["graph" if bucket in self._graphs else "eager"].inc()
        return outputs

    def _run(self, batch: Sequence[EngineInput]) -> list[EngineOutput]:
        bucket = pick_bucket(len(batch), self.buckets)
        rows = self._staging[:bucket]
        for row, item in zip(rows.numpy(), batch, strict=False):
            row[...] = item.pixels
        if graph := self._graphs.get(bucket):
            (pixels,) = graph.inputs
            pixels.copy_(rows, non_blocking=True)
            graph.replay()
            scores, locations = graph.outputs
        elif self._device.torch_device.type == "cpu":
            parts = self._device.lanes.map(lambda share: self._classify(rows[share]), bucket)
            scores = torch.cat([part.logits for part in parts])
            of_layers = zip(*(part.sampling_locations for part in parts), strict=True)
            locations = tuple(map(torch.cat, of_layers))
        else:
            scores, locations = self._classify(rows.to(self._device.torch_device))
        scores_np = to_host(scores)
        # One copy for the batch, and none where nobody asked.
        explained = [to_host(layer) for layer in locations] if any(i.explain for i in batch) else []
        return [
            EngineOutput(
                scores_np[row],
                tuple(layer[row] for layer in explained) if item.explain else (),
            )
            for row, item in enumerate(batch)
        ]


def to_host(tensor: Tensor) -> NDArray[np.float32]:
    """A host copy that outlives the next replay."""
    host: NDArray[np.float32] = tensor.to("cpu", torch.float32, copy=True).numpy()
    return host
