"""Which items go together in the next batch, and which make way."""

import asyncio
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from math import inf
from time import perf_counter
from typing import Any, Generic, TypeVar

from service.batching.forecast import Forecast
from service.batching.queue import HeldPlace, Result, Served
from service.batching.waiting import Waiting
from service.errors import DeadlineExceeded, ServiceError

Item = TypeVar("Item")

_SLACK = 1.1  # times what a batch is foretold to take are left for it
_UNLIKE_OTHERS = 2.0  # times as long as they waits who will wait on


@dataclass(eq=False, slots=True)
class Entry(Generic[Item, Result]):
    """An item in the queue, or on the device.

    Attributes:
        item: what `run_batch` takes.
        place: is given back when it leaves the queue.
        future: its answer.
        enqueued_at: perf_counter, seconds: loop time has a resolution of milliseconds.
        deadline: loop time, seconds.
        left: whether its caller no longer waits.
    """

    item: Item
    place: HeldPlace
    future: asyncio.Future[Served[Result]]
    enqueued_at: float
    deadline: float
    left: bool = False

    def alive(self, loop_time: float) -> bool:
        """Whether an answer is still of use."""
        # A busy loop can be late with the timeout of an entry.
        return self.deadline > loop_time and not self.left and not self.future.done()


class Gathering(Generic[Item, Result]):
    """Takes the items of a batch from those that wait, in their order.

    A batch is of one group, and only so large that its items can still be answered in their time.

    Args:
        queue: those that wait.
        forecast: how long batches take.
        group: what all items of a batch must have in common.
        waited: is told how long each item has waited, seconds.
    """

    def __init__(
        self,
        queue: Waiting[Entry[Item, Result]],
        forecast: Forecast,
        group: Callable[[Item], Hashable],
        waited: Callable[[float], None],
    ) -> None:
        self._queue = queue
        self._forecast = forecast
        self._group = group
        self._waited = waited

    def take(self, most: int) -> list[Entry[Item, Result]]:
        """Take the next batch from the queue, of so many items at most.

        Empty if nobody waits any more for those that were in the queue.
        """
        loop_time = asyncio.get_running_loop().time()
        waiting = list(self._queue)
        in_time = (entry for entry in waiting if self._in_time(entry, most, loop_time))
        return self._gather(in_time, most) or self._gather(list(self._queue), most)

    def _in_time(self, entry: Entry[Item, Result], size: int, loop_time: float) -> bool:
        """Whether an item should not make way for those that came after it.

        Where more is asked for than can be answered, the first ones have hardly any time left. A
        batch so small that they were answered would make all others wait until theirs had to be
        as small, and what devices compute in small batches is less. So who has waited for half of
        its time goes with a batch of the usual size in time, or when nobody else waits.
        """
        wanted = self._wanted_by(entry, loop_time)
        batch_s = _SLACK * self._forecast.compute_s(size)
        return wanted - loop_time >= min(batch_s, (wanted - entry.place.since) / 2)

    def _gather(
        self, entries: Iterable[Entry[Item, Result]], most: int
    ) -> list[Entry[Item, Result]]:
        """Take the items of a batch from the queue, and throw out those that nobody waits for."""
        loop_time, now = asyncio.get_running_loop().time(), perf_counter()
        batch: list[Entry[Item, Result]] = []
        earliest = inf
        for entry in entries:
            if len(batch) == most:
                break
            if not entry.alive(loop_time):
                self._remove(entry)
                fail(entry, too_late())
                continue
            if batch and self._group(entry.item) != self._group(batch[0].item):
                continue
            wanted = self._wanted_by(entry, loop_time)
            if loop_time + self._forecast.compute_s(1) <= wanted:  # else it is late all the same
                earliest = min(earliest, wanted)
            takes_s = _SLACK * self._forecast.compute_s(len(batch) + 1)
            if batch and loop_time + takes_s > earliest:
                break
            self._remove(entry)
            self._waited(now - entry.enqueued_at)
            batch.append(entry)
        return batch

    def _remove(self, entry: Entry[Item, Result]) -> None:
        self._queue.discard(entry)
        entry.place.give_back()

    def _wanted_by(self, entry: Entry[Item, Result], loop_time: float) -> float:
        """When the caller of an item, by what is known of it, will have left; loop time.

        Who is still there when others have long left is not like them.
        """
        since, patient_until = entry.place.since, entry.place.patient_until
        if loop_time - since > _UNLIKE_OTHERS * (patient_until - since):
            return entry.deadline
        return min(entry.deadline, patient_until)


def too_late() -> DeadlineExceeded:
    """What the caller of an item is told whose deadline passed."""
    return DeadlineExceeded("the deadline passed before the answer")


def fail(entry: Entry[Any, Any], error: ServiceError) -> None:
    """Answer an item with an error, if it has no answer yet."""
    if not entry.future.done():
        entry.future.set_exception(error)
