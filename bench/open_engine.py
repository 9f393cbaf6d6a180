"""An engine as the service opens it, in this process."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from model import DAT
from model.detection import Detector
from model.swin import Swin
from service import process
from service.engine.classification import ClassificationEngine
from service.engine.detection import DetectionEngine
from service.engine.device import Device
from service.metrics.replica import Metrics

T = TypeVar("T")


class OpenEngine:
    """A classifier or detector in its engine, loaded.

    Args:
        network: its weights are there.
        device: that computes.
        dtype: of the engine, by name.
        **options: of the engine.

    Attributes:
        network: on the device.
    """

    def __init__(
        self, network: DAT | Swin | Detector, device: Device, dtype: str, **options: Any
    ) -> None:
        process.compute_float32_in_full()
        self.network = network
        self._device = device
        task = "detect" if isinstance(network, Detector) else "classify"
        unread = Metrics(CollectorRegistry()).add_model(network.config.name, "bench", task, 1)
        self._engine: ClassificationEngine | DetectionEngine
        if isinstance(network, Detector):
            self._engine = DetectionEngine(network, device, unread, dtype=dtype, **options)
        else:
            self._engine = ClassificationEngine(network, device, unread, dtype=dtype, **options)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._engine.load())

    def run(self, batch: Sequence[Any]) -> list[Any]:
        """Run one batch."""
        return self._loop.run_until_complete(self._engine.run_batch(batch))

    def run_many(self, batch: Sequence[Any], times: int, together: int) -> None:
        """Run a batch several times, so many at a time."""
        left = iter(range(times))

        async def in_turn() -> None:
            for _ in left:
                await self._engine.run_batch(batch)

        async def all_turns() -> None:
            await asyncio.gather(*(in_turn() for _ in range(together)))

        self._loop.run_until_complete(all_turns())

    def in_its_thread(self, work: Callable[[], T]) -> T:
        """Do work in the thread of the device."""
        return self._loop.run_until_complete(self._device.run(work))

    def close(self) -> None:
        """End its event loop; it computes nothing any more."""
        self._loop.close()
