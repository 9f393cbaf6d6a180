"""The one thread that touches the device: it loads, warms up and runs batches."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.dat import DAT, Explained
from model.transforms import Normalise
from service.engine.graphs import CapturedGraph, capture, default_buckets, pick_bucket
from service.metrics import Metrics

T = TypeVar("T")

DEFAULT_MAX_BATCH = {"cpu": 8, "cuda": 64}
DEFAULT_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


class DeviceUnavailable(Exception):
    """The device that was asked for is not there."""


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
    """Runs batches of one classifier on one device, from one thread.

    Attributes:
        buckets: batch sizes that the device runs, ascending; a batch is padded to the next.
        max_batch: most images in one batch.
        healthy: whether the device can still be trusted.

    Raises:
        DeviceUnavailable: the device is not there.
    """

    def __init__(
        self,
        model: DAT,
        metrics: Metrics,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 0,
        max_batch: int = 0,
        buckets: Sequence[int] = (),
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(f"the engine's device is {device}, but torch sees no GPU")
        self.dtype = DEFAULT_DTYPE[self.device.type] if dtype == "auto" else getattr(torch, dtype)
        largest = max_batch or (max(buckets) if buckets else DEFAULT_MAX_BATCH[self.device.type])
        self.buckets = tuple(sorted(buckets)) or default_buckets(self.device, largest)
        self.max_batch = self.buckets[-1]
        self.healthy = True
        self._model = model
        self._metrics = metrics
        self._threads = threads
        self._image_size = model.config.image_size
        self._graphs: dict[int, CapturedGraph] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    async def load(self) -> None:
        """Move the model to the device and run every bucket once.

        Raises:
            RuntimeError: the device cannot be used, or a graph cannot be captured.
        """
        await self._in_thread(self._load)

    async def run_batch(self, batch: Sequence[EngineInput]) -> list[EngineOutput]:
        """Classify at most `max_batch` images; what the batcher calls.

        Raises:
            RuntimeError: the device failed.
        """
        try:
            return await self._in_thread(lambda: self.forward(batch))
        except torch.AcceleratorError:
            # After such an error the CUDA context of the process is lost: only a restart helps.
            self.healthy = False
            raise

    def close(self) -> None:
        """Wait for the batch in hand and end the thread."""
        self._thread.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _load(self) -> None:
        torch.set_num_threads(self._threads or torch.get_num_threads())
        # Rows past a batch keep what an earlier one left.
        self._staging = torch.zeros(
            (self.max_batch, *self._image_size, 3),
            dtype=torch.uint8,
            pin_memory=self.device.type == "cuda",
        )
        start = perf_counter()
        self._classify = Classify(self._model, self.dtype).to(self.device).eval()
        self._metrics.load_seconds["build"].set(perf_counter() - start)
        start = perf_counter()
        with torch.inference_mode():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                self._graphs = capture(self._classify, self.buckets, self._image_size, self.device)
            blank = EngineInput(np.zeros((*self._image_size, 3), np.uint8), explain=True)
            for bucket in reversed(self.buckets):
                self._run([blank] * bucket)
        self._metrics.load_seconds["warmup"].set(perf_counter() - start)

    def forward(self, batch: Sequence[EngineInput]) -> list[EngineOutput]:
        """Classify a batch in the calling thread, which must be the engine's after `load`."""
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
            graph.pixels.copy_(rows, non_blocking=True)
            scores, locations = graph.replay()
        else:
            scores, locations = self._classify(rows.to(self.device))
        scores_np = _to_host(scores)
        # One copy for the batch, and none where nobody asked.
        explained = (
            [_to_host(layer) for layer in locations] if any(i.explain for i in batch) else []
        )
        return [
            EngineOutput(
                scores_np[row],
                tuple(layer[row] for layer in explained) if item.explain else (),
            )
            for row, item in enumerate(batch)
        ]


def _to_host(tensor: Tensor) -> NDArray[np.float32]:
    """A host copy that outlives the next replay."""
    host: NDArray[np.float32] = tensor.float().cpu().numpy()
    return host
