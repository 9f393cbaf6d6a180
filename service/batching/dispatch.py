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
from service.share import Share


class Dispatchable(Protocol):
    """What the dispatch needs to know of a device."""

    @property
    def depth(self) -> int:
        """Batches of all its cores that it takes; the next is copied in while one is computed."""
        ...

    @property
    def cores(self) -> int:
        """That batches can have a part of; 1 where a batch always has the whole device."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether it can still be trusted."""
        ...


# What a batch would take of a device, by the index of that and the cores that are free.
Sharing = Callable[[int, int], Share]


class Place:
    """One of the batches that a device takes at a time; left at the end of its context.

    Attributes:
        device: its index.
        share: of the device.
        part: of the cores of the device, 1.0 for all of them.
        beside: how many batches with such a share could begin now, beside this one.
    """

    def __init__(
        self,
        device: int,
        share: Share,
        load: "_Load",
        leave: Callable[["Place"], None],
    ) -> None:
        self.device = device
        self.share = share
        self.part = share.cores / load.cores
        self.beside = max(0, load.free) // share.cores
        self._load = load
        self._leave = leave
        self._is_ahead = load.free < 0
        self._entered = perf_counter()

    @property
    def began(self) -> float:
        """When the device turned to this batch; perf_counter, seconds."""
        return max(self._entered, self._load.turned) if self._is_ahead else self._entered

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
    cores: int
    free: int  # cores; fewer than 0 where a batch went ahead
    batches: int = 0
    given: int = 0  # number of the newest place of the whole replica
    turned: float = 0.0  # end of the newest batch, perf_counter, seconds


@dataclass(eq=False)
class _Waiter:
    full: Callable[[], bool]
    sharing: Sharing
    place: asyncio.Future[Place]


class Dispatch:
    """Gives out the places of all devices of a replica.

    The least loaded device is next: the one with the fewest batches, and of several the one that
    was idle for longest. Batches that take a part of its cores run beside each other while cores
    are free. Where a batch has all of them, another one goes ahead only if it is full, for a batch
    that is not would go on growing while the device is busy. A device that cannot be trusted takes
    nothing.
    """

    def __init__(self, devices: Sequence[Dispatchable]) -> None:
        self._devices = devices
        self._loads = [_Load(device.cores, device.cores) for device in devices]
        self._line: deque[_Waiter] = deque()
        self._given = 0

    def images(self, sharing: Sharing) -> int:
        """How many images all devices take at a time.

        Args:
            sharing: what batches take while many images wait.
        """
        shares = (sharing(index, device.cores) for index, device in enumerate(self._devices))
        return sum(
            share.images * max(device.depth, device.cores // share.cores)
            for device, share in zip(self._devices, shares, strict=True)
        )

    @property
    def available(self) -> bool:
        """Whether any device can be trusted."""
        return any(device.healthy for device in self._devices)

    async def place(self, full: Callable[[], bool], sharing: Sharing) -> Place:
        """Wait for a place in the line.

        Args:
            full: whether a batch that left now would be as large as it can be.
            sharing: what the batch would take.

        Raises:
            EngineUnavailable: no device can be trusted.
        """
        waiter = _Waiter(full, sharing, asyncio.get_running_loop().create_future())
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
                if (place := self._place_for(waiter)) is None:
                    return
                waiter.place.set_result(place)
            self._line.popleft()

    def _place_for(self, waiter: _Waiter) -> Place | None:
        """A place on the next device, if any has one."""
        loads = self._loads
        by_load = sorted(
            (index for index, device in enumerate(self._devices) if device.healthy),
            key=lambda index: (loads[index].batches, loads[index].given),
        )
        for index in by_load:
            load, share = loads[index], waiter.sharing(index, loads[index].free)
            if share.cores <= load.free or self._goes_ahead(index, share, waiter):
                self._given += 1
                load.batches, load.given = load.batches + 1, self._given
                load.free -= share.cores
                return Place(index, share, load, self._leave)
        return None

    def _goes_ahead(self, index: int, share: Share, waiter: _Waiter) -> bool:
        """Whether a batch may wait in the device for the one that has all its cores."""
        load, device = self._loads[index], self._devices[index]
        are_whole = load.cores - load.free == load.batches * load.cores
        is_whole = share.cores == load.cores
        return are_whole and is_whole and load.batches < device.depth and waiter.full()

    def _leave(self, place: Place) -> None:
        load = self._loads[place.device]
        load.batches -= 1
        load.free += place.share.cores
        load.turned = perf_counter()
        self.reconsider()


def no_device() -> EngineUnavailable:
    """What a caller is told when no device can be trusted."""
    return EngineUnavailable("every device of this replica is lost; it must be started again")
