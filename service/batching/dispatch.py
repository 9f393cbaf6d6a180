"""Which device the next batch goes to, and when.

The batchers of all models stand in one line, first come, first served. Knows nothing of batches,
torch or threads.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

from service.errors import EngineUnavailable


class Dispatchable(Protocol):
    """What the dispatch needs to know of a device."""

    @property
    def depth(self) -> int:
        """Batches that it takes at a time; copying in the next overlaps the one it computes."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether it can still be trusted."""
        ...


class Place:
    """One of the batches that a device takes at a time; left at the end of its context.

    Attributes:
        device: its index.
    """

    def __init__(self, device: int, load: "_Load", leave: Callable[["Place"], None]) -> None:
        self.device = device
        self._load = load
        self._leave = leave
        self._entered = perf_counter()

    @property
    def began(self) -> float:
        """When the device turned to this batch from the one before; perf_counter, seconds."""
        return max(self._entered, self._load.turned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave(self)


@dataclass
class _Load:
    batches: int = 0
    given: int = 0  # number of the newest place of the whole replica
    turned: float = 0.0  # end of the newest batch, perf_counter, seconds


@dataclass(eq=False)
class _Waiter:
    full: Callable[[], bool]
    place: asyncio.Future[Place]


class Dispatch:
    """Gives out the places of all devices of a replica.

    The least loaded device is next: the one with the fewest batches, and of several the one that
    was idle for longest. A device that has a batch takes another one only if that is full, for
    a batch that is not would go on growing while the device is busy. A device that cannot be
    trusted takes nothing.
    """

    def __init__(self, devices: Sequence[Dispatchable]) -> None:
        self._devices = devices
        self._loads = [_Load() for _ in devices]
        self._line: deque[_Waiter] = deque()
        self._given = 0

    @property
    def depths(self) -> list[int]:
        """How many batches each device takes at a time."""
        return [device.depth for device in self._devices]

    @property
    def available(self) -> bool:
        """Whether any device can be trusted."""
        return any(device.healthy for device in self._devices)

    async def place(self, full: Callable[[], bool]) -> Place:
        """Wait for a place in the line.

        Args:
            full: whether a batch that left now would be as large as it can be.

        Raises:
            EngineUnavailable: no device can be trusted.
        """
        waiter = _Waiter(full, asyncio.get_running_loop().create_future())
        self._line.append(waiter)
        self.reconsider()
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter in self._line:
                self._line.remove(waiter)
                self.reconsider()
            elif not waiter.place.cancelled() and waiter.place.exception() is None:
                self._leave(waiter.place.result())
            raise

    def reconsider(self) -> None:
        """Give out what can be given.

        To be called when the batch of a waiter became full, and when a device is lost.
        """
        available = self.available
        while self._line:
            waiter = self._line[0]
            if not available and not waiter.place.done():
                waiter.place.set_exception(no_device())
            elif not waiter.place.done():
                device = self._least_loaded()
                if device is None or (self._loads[device].batches and not waiter.full()):
                    return
                self._given += 1
                load = self._loads[device]
                load.batches, load.given = load.batches + 1, self._given
                waiter.place.set_result(Place(device, load, self._leave))
            self._line.popleft()

    def _least_loaded(self) -> int | None:
        """The next device, if any has a place."""
        loads, devices = self._loads, self._devices
        return min(
            (
                index
                for index, device in enumerate(devices)
                if device.healthy and loads[index].batches < device.depth
            ),
            key=lambda index: (loads[index].batches, loads[index].given),
            default=None,
        )

    def _leave(self, place: Place) -> None:
        load = self._loads[place.device]
        load.batches -= 1
        load.turned = perf_counter()
        self.reconsider()


def no_device() -> EngineUnavailable:
    """What a caller is told when no device can be trusted."""
    return EngineUnavailable("every device of this replica is lost; it must be started again")
