"""What the engines of all tasks do: load, run batches within their time, try a blank image."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from service.engine import gpu
from service.engine.computing import Computing
from service.engine.device import Device
from service.engine.graphs import choose_buckets, pick_bucket
from service.metrics.model import ModelMetrics
from service.share import Share


class Engine(ABC):
    """Runs batches of one model on a device.

    Args:
        dtype: of the features; `auto` means `gpu.default_dtype`.
        max_batch: most images in one batch; 0 means the largest bucket, or `default_max_batch`.
        buckets: batch sizes that the device runs; empty means `default_buckets`.
        default_max_batch: where neither is given.

    Attributes:
        buckets: batch sizes that the device runs, ascending; a batch is padded to the next.
        max_batch: most images in one batch.
        dtype: of the features.
    """

    def __init__(
        self,
        device: Device,
        metrics: ModelMetrics,
        *,
        dtype: str,
        max_batch: int,
        buckets: Sequence[int],
        default_max_batch: int,
    ) -> None:
        at = device.torch_device
        self.dtype: torch.dtype = (
            gpu.default_dtype(at) if dtype == "auto" else getattr(torch, dtype)
        )
        self.buckets = choose_buckets(at, buckets, max_batch, default_max_batch)
        self.max_batch = self.buckets[-1]
        self._device = device
        self._metrics = metrics
        self._pace = device.pace()

    async def load(self) -> Computing:
        """Make the model ready on the device, and say what computes it.

        Raises:
            RuntimeError: the device cannot be used, or a graph cannot be captured.
        """
        began = perf_counter()
        computing = await self._device.load(self._load)
        loaded = perf_counter()
        # As any batch: beside those of other models.
        for warm_up in self._warm_ups():
            await self._device.run(warm_up)
        now = perf_counter()
        self._metrics.load_seconds["warmup"].inc(now - loaded)
        return replace(computing, seconds=now - began)

    async def unload(self) -> None:
        """Give its memory back; no batch comes any more.

        Raises:
            EngineUnavailable: the device is lost.
        """
        await self._device.run(self._unload)

    def share(self, in_flight: int, free: int) -> Share:  # noqa: ARG002
        """What the next batch takes of the device; see `batcher.Runner`. Most take all of it."""
        return Share(self._device.cores, self.max_batch)

    async def run_batch(self, batch: Sequence[Any], cores: int | None = None) -> list[Any]:
        """The outputs of at most `max_batch` images of one group; what the batcher calls.

        Args:
            batch: the images.
            cores: of the device that it has; `None` means all of them.

        Raises:
            EngineUnavailable: the device is lost.
            OutOfMemory: the batch needs more memory than there is.
            RuntimeError: the device failed.
        """
        cost = sum(map(self.cost, batch))
        limit_s = self._pace.limit_s(cost)
        cores = self._device.cores if cores is None else cores
        launch = self._pace.timed(lambda: self.launch(batch, cores), cost)
        return await self._device.compute(lambda: self._pace.timed(launch(), cost), limit_s, cores)

    def cost(self, item: Any) -> int:
        """The bytes of pixels that an image has the device work on."""
        return int(item.pixels.size)

    async def settle(self) -> None:  # noqa: B027
        """Work of the engine's own after a batch; most have none."""

    async def probe(self, cores: int | None = None) -> None:
        """Run a blank image: a failure is the model's or the device's, not the image's.

        Args:
            cores: as of `run_batch`.

        Raises:
            Exception: whatever the device says.
        """
        await self.run_batch([self._blank()], cores)

    def describe(self, size: int) -> dict[str, object]:
        """What runs a batch of so many images, for the log."""
        bucket = pick_bucket(size, self.buckets)
        return {"model": self._metrics.model, "device": self._device.name, "bucket": bucket}

    @abstractmethod
    def launch(self, batch: Sequence[Any], cores: int | None = None) -> Callable[[], list[Any]]:
        """Begin a batch, in a thread of the device; the function returned waits for its end.

        Args:
            batch: as of `run_batch`.
            cores: likewise.
        """

    @abstractmethod
    def _load(self) -> Generator[None, None, Computing]:
        """Make the model from its weights; see `Device.load`."""

    @abstractmethod
    def _warm_ups(self) -> Iterable[Callable[[], object]]:
        """First batches, which count nowhere."""

    @abstractmethod
    def _unload(self) -> None:
        """Forget the network and all that was made of it, in the thread of the device."""

    @abstractmethod
    def _blank(self) -> Any:
        """An image of one colour that the model takes."""
