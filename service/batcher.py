"""Turns single images into batches, in order of arrival.

The batcher knows nothing of images, torch or transports: it moves opaque items from callers to
the runner of a device and the results back.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Protocol, Self, TypeVar

import structlog

from service.dispatch import Dispatch, Place
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    NotReady,
    Overloaded,
)
from service.metrics import ModelMetrics

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

log = structlog.get_logger(__name__)

_SMOOTHING = 0.2  # share of the newest batch in the running seconds per item


class Runner(Protocol[Item_contra, Result_co]):
    """What runs the batches of a model on one device."""

    async def run_batch(self, batch: Sequence[Item_contra]) -> Sequence[Result_co]:
        """Results for each item, in order."""
        ...

    async def settle(self) -> None:
        """Work of the runner's own before the next batch; no answer waits for it."""
        ...


@dataclass(frozen=True)
class Served(Generic[Result]):
    """An answer with the story of its batch.

    Attributes:
        result: what the runner returned for the item.
        queue_s: from the queue to the device, seconds.
        compute_s: of the whole batch on the device, seconds.
        batch_size: items of the batch, without padding.
    """

    result: Result
    queue_s: float
    compute_s: float
    batch_size: int


class Admission:
    """Places in the queue for the items of one request.

    A place is held from admission, through decoding and the queue, until the item goes to the
    device or is given up; the end of the context gives back what is left.
    """

    def __init__(self, places: int, release: Callable[[int], None]) -> None:
        self._places = places
        self._release = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(self._places)

    def give_back(self, places: int = 1) -> None:
        """Give back places that are no longer needed."""
        assert places <= self._places, "a place was given back twice: this is a bug"
        self._places -= places
        self._release(places)


@dataclass(eq=False, slots=True)
class _Entry(Generic[Item, Result]):
    item: Item
    admission: Admission
    future: asyncio.Future[Served[Result]]
    enqueued_at: float  # perf_counter: loop time has a resolution of milliseconds
    deadline: float  # loop time, seconds


class Batcher(Generic[Item, Result]):
    """A bounded first-in, first-out queue before one or several devices.

    A batch leaves as soon as a device has a place for it (see `Dispatch`) and an item waits, with
    up to `max_batch` of those that wait: the oldest, and the next ones of its group, so that no
    group waits for ever.
    Every item gets exactly one answer: a result or an error. An item whose
    caller left or whose deadline passed leaves the queue at once and never reaches the device.

    Args:
        runners: one for each device, in the order of the dispatch; take at most `max_batch` items.
        max_batch: most items in one batch.
        queue_limit: most items admitted and not yet in a batch.
        metrics: of the model whose items these are.
        dispatch: of the devices; shared by the batchers of all models.
        group: what all items of a batch must have in common; all may share one by default.
    """

    def __init__(
        self,
        runners: Sequence[Runner[Item, Result]],
        *,
        max_batch: int,
        queue_limit: int,
        metrics: ModelMetrics,
        dispatch: Dispatch,
        group: Callable[[Item], Hashable] = lambda _: None,
    ) -> None:
        self._runners = runners
        self._max_batch = max_batch
        self._queue_limit = queue_limit
        self._metrics = metrics
        self._dispatch = dispatch
        self._group = group
        self._queue: OrderedDict[_Entry[Item, Result], None] = OrderedDict()
        self._held = 0  # places admitted and not given back
        self._running = 0
        self._seconds_per_item = 0.0
        self._served_at = 0.0  # end of the newest batch, perf_counter
        self._wakeup = asyncio.Event()
        self._open = False
        self._draining = False

    @property
    def wait_estimate_s(self) -> float:
        """Time in which everything admitted so far will have reached the device, seconds."""
        return (self._held + self._running) * self._seconds_per_item

    @property
    def has_room(self) -> bool:
        """Whether one more item would be admitted now; asking counts nowhere."""
        return self._open and not self._draining and self._held < self._queue_limit

    def open(self) -> None:
        """Begin to admit."""
        self._open = True

    def begin_drain(self) -> None:
        """Stop admitting; `run` returns once everything admitted has its answer."""
        self._draining = True
        self._wakeup.set()

    def admit(self, places: int) -> Admission:
        """Take places in the queue for a request, all or none.

        Raises:
            NotReady: the replica does not admit yet.
            Draining: the replica no longer admits.
            Overloaded: fewer places are free.
        """
        self.check_room(places)
        self._change_held(places)
        return Admission(places, self._release)

    def check_room(self, places: int = 1) -> None:
        """Ask what `admit` would say now, without taking anything.

        Raises:
            NotReady: the replica does not admit yet.
            Draining: the replica no longer admits.
            Overloaded: fewer places are free.
        """
        if self._draining:
            self._metrics.rejected["draining"].inc()
            raise Draining("this replica is draining")
        if not self._open:
            self._metrics.rejected["not_ready"].inc()
            raise NotReady("this replica is starting")
        if self._held + places > self._queue_limit:
            self._metrics.rejected["queue_full"].inc()
            raise Overloaded(
                f"the queue holds {self._held} of {self._queue_limit} images",
                retry_after_s=self.wait_estimate_s,
            )

    async def submit(self, item: Item, admission: Admission, deadline: float) -> Served[Result]:
        """Queue one item, on a place of `admission`, and wait for its answer.

        Args:
            item: what `run_batch` takes.
            admission: holds a place for the item.
            deadline: loop time after which the answer is of no use, seconds.

        Raises:
            DeadlineExceeded: the deadline passed first.
            EngineFailed: the batch that held the item failed.
        """
        loop = asyncio.get_running_loop()
        entry = _Entry(item, admission, loop.create_future(), perf_counter(), deadline)
        self._queue[entry] = None
        self._wakeup.set()
        if len(self._queue) >= self._max_batch:
            self._dispatch.reconsider()
        try:
            async with asyncio.timeout_at(deadline):
                return await entry.future
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the answer") from None
        finally:
            if entry in self._queue:
                del self._queue[entry]
                admission.give_back()

    async def run(self) -> None:
        """Serve batches until drained."""
        async with asyncio.TaskGroup() as batches:
            while await self._wait_for_work():
                asked = perf_counter()
                # The batch is taken when a device has a place for it: it gathers until then.
                place = await self._dispatch.place(self._full)
                batches.create_task(self._serve(self._take(), place, asked))

    async def _wait_for_work(self) -> bool:
        while not self._queue:
            if self._draining and not self._held:
                return False
            self._wakeup.clear()
            await self._wakeup.wait()
        return True

    def _take(self) -> list[_Entry[Item, Result]]:
        loop_time, now = asyncio.get_running_loop().time(), perf_counter()
        batch: list[_Entry[Item, Result]] = []
        for entry in list(self._queue):
            if len(batch) == self._max_batch:
                break
            # A busy loop can be late with the timeout of an entry.
            alive = entry.deadline > loop_time and not entry.future.done()
            if alive and batch and self._group(entry.item) != self._group(batch[0].item):
                continue
            del self._queue[entry]
            entry.admission.give_back()
            if alive:
                self._metrics.stage["queue"].observe(now - entry.enqueued_at)
                batch.append(entry)
        return batch

    def _full(self) -> bool:
        if len(self._queue) < self._max_batch:
            return False
        groups = [self._group(entry.item) for entry in self._queue]
        return groups.count(groups[0]) >= self._max_batch

    async def _serve(self, batch: list[_Entry[Item, Result]], place: Place, asked: float) -> None:
        with place:
            if batch:
                runner = self._runners[place.device]
                await self._answer(batch, runner, place, asked)
                await runner.settle()

    async def _answer(
        self,
        batch: list[_Entry[Item, Result]],
        runner: Runner[Item, Result],
        place: Place,
        asked: float,
    ) -> None:
        size = len(batch)
        self._metrics.batches["full" if size == self._max_batch else "idle"].inc()
        self._change_running(size)
        try:
            results = await runner.run_batch([entry.item for entry in batch])
            answers = list(zip(batch, results, strict=True))
        except Exception as cause:  # the one broad except: a bad batch must not end the loop
            log.exception("batch failed", images=size)
            for entry in batch:
                if not entry.future.done():
                    error = EngineFailed("the batch failed on the device")
                    error.__cause__ = cause  # one error per caller: tracebacks grow
                    entry.future.set_exception(error)
            return
        finally:
            self._change_running(-size)
        began = place.began
        compute_s = perf_counter() - began
        self._account(size, place.device, compute_s, asked)
        for entry, result in answers:
            # A caller can leave while its batch runs; to answer it would raise and end the loop.
            if not entry.future.done():
                queue_s = began - entry.enqueued_at
                entry.future.set_result(Served(result, queue_s, compute_s, size))

    def _account(self, size: int, device: int, compute_s: float, asked: float) -> None:
        self._metrics.batch_size.observe(size)
        self._metrics.stage["compute"].observe(compute_s)
        self._metrics.busy_seconds[device].inc(compute_s)
        # Under load the time between the ends of two batches, on whichever devices they were,
        # and with the time in which other models had those.
        now = perf_counter()
        newest = (now - max(asked, self._served_at)) / size
        self._served_at = now
        if not self._seconds_per_item:
            self._seconds_per_item = newest
        self._seconds_per_item += _SMOOTHING * (newest - self._seconds_per_item)
        self._metrics.wait_estimate.set(self.wait_estimate_s)

    def _change_held(self, places: int) -> None:
        self._held += places
        self._metrics.waiting.set(self._held)
        self._metrics.wait_estimate.set(self.wait_estimate_s)

    def _release(self, places: int) -> None:
        self._change_held(-places)
        self._wakeup.set()  # a drain waits for the last place

    def _change_running(self, size: int) -> None:
        self._running += size
        self._metrics.running.set(self._running)
