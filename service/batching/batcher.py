"""Turns single images into batches, in order of arrival within each class of requests.

The batcher knows nothing of images, torch or transports: it moves opaque items from callers to
the runner of a device and the results back.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from math import inf
from time import perf_counter
from typing import Any, Generic, Protocol

import numpy as np
import structlog

from service.batching.admission import Admission, AdmissionControl, Places, Refusal
from service.batching.breaker import Breaker, Fit
from service.batching.dispatch import Dispatch, Place, no_device
from service.batching.forecast import Forecast
from service.batching.gathering import Entry, Gathering, Item, fail, too_late
from service.batching.peak import Peak
from service.batching.queue import Empty, HeldPlace, Result, Served, Turn
from service.batching.waiting import T, Turns, Waiting
from service.errors import (
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    OutOfMemory,
    ServiceError,
)
from service.metrics.model import ModelMetrics
from service.priority import Priority
from service.share import Share

log = structlog.get_logger(__name__)

_MANY = 1000  # items in flight: more than any device has cores
# How many batches of images are decoded ahead of the devices, beside those that these compute:
# a batch that waits, and one that is being decoded. What waits beyond that holds no pixels, and
# costs nothing if its caller leaves.
_BATCHES_AHEAD = 2
# For how many passes of one image it is remembered how many were in flight: each of two callers
# that ask in turn finds the other one's image answered, and is not alone.
_PASSES_REMEMBERED = 2.0
# How long after a failure parts of its batch are still tried, seconds: others wait meanwhile.
_ISOLATE_S = 5.0


class Runner(Protocol):
    """What runs the batches of a model on one device."""

    def share(self, in_flight: int, free: int) -> Share:
        """What the next batch takes of the device.

        Args:
            in_flight: items that wait or are computed at a time, of late.
            free: cores of the device that no batch has; as few as 0.
        """

    async def run_batch(self, batch: Sequence[Any], cores: int) -> Sequence[Any]:
        """Results for each item, in order.

        Args:
            batch: the items.
            cores: of the device that it has.

        Raises:
            EngineUnavailable: the device is lost.
            OutOfMemory: the items are too many, or one of them is too large.
        """
        ...

    async def settle(self) -> None:
        """Work of the runner's own before the next batch; no answer waits for it."""
        ...

    async def probe(self, cores: int) -> None:
        """Run a blank item on so many cores; raises whatever the device says."""
        ...

    def describe(self, size: int) -> dict[str, object]:
        """What runs a batch of so many items, for the log: model, device and bucket."""
        ...


class _LocalTurn:
    """A turn in the queue of this process.

    Args:
        submit: of the batcher.
    """

    def __init__(self, submit: Callable[..., Awaitable[Served[Any]]]) -> None:
        self.submit = submit

    def fill(self, work: Callable[[Empty], T]) -> T:
        """Do the work of decoding."""
        return work(lambda shape: np.empty(shape, np.uint8))


class Batcher(Generic[Item, Result]):
    """A bounded queue before one or several devices: the upper class before the lower one.

    Each class is served first come, first served, and who waits for long in the lower one counts
    as one of the upper (`Waiting`). A batch leaves as soon as a device has a place for it (see
    `Dispatch`) and an item waits, with up to `max_batch` of those that wait: the first, and the
    next ones of its group, so that no group waits for ever.
    Every item gets exactly one answer: a result or an error. An item whose
    caller left or whose deadline passed leaves the queue at once and never reaches the device.
    What the forecast says cannot be answered in its time is not admitted, and a batch is only so
    large that its items can still be answered in their time.

    A batch that fails is tried again in halves, so that only the item that makes it fail does; one
    that does not fit into memory likewise, and its size is remembered for a while. When several
    batches in a row fail and a blank item does too, nothing more is admitted until a blank item
    works (`Breaker`).

    Args:
        runners: one for each device, in the order of the dispatch; take at most `max_batch` items.
        max_batch: most items in one batch.
        places: in the queue, for items admitted and not yet in a batch.
        metrics: of the model whose items these are.
        dispatch: of the devices; shared by the batchers of all models.
        group: what all items of a batch must have in common; all may share one by default.
        goes_ahead: whether a full batch goes to a device that has not done another one.
        forecast: learns from the batches.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        *,
        max_batch: int,
        places: Places,
        metrics: ModelMetrics,
        dispatch: Dispatch,
        group: Callable[[Item], Hashable] = lambda _: None,
        goes_ahead: bool = True,
        forecast: Forecast | None = None,
    ) -> None:
        self._runners = runners
        self._max_batch = max_batch
        self._places = places
        self._metrics = metrics
        self._dispatch = dispatch
        self._group = group
        self._goes_ahead = goes_ahead
        self._breaker = Breaker(metrics.failing)
        self._fit = Fit(max_batch)
        self._queue: Waiting[Entry[Item, Result]] = Waiting()
        self.forecast = forecast or Forecast()
        self._gathering = Gathering(
            self._queue, self.forecast, group, metrics.stage["queue"].observe
        )
        self._wakeup = asyncio.Event()
        self._admission = AdmissionControl(
            places,
            self.forecast,
            metrics,
            unavailable=self._unavailable,
            released=self._wakeup.set,  # a drain waits for the last place
        )
        computed = dispatch.images(lambda device, free: runners[device].share(_MANY, free))
        # The upper class may be half a batch further ahead, rather than wait for the lower one.
        self._ahead = Turns(computed + _BATCHES_AHEAD * max_batch, kept=-(-max_batch // 2))
        self._in_flight = Peak()
        self._running = 0  # items on the devices
        self._turn = _LocalTurn(self.submit)
        self._served_at = 0.0  # end of the newest batch, perf_counter
        self._crowded = False  # whether a whole batch, decoded or not, waited then

    @property
    def wait_estimate_s(self) -> float:
        """Time in which everything admitted so far will have reached the device, seconds."""
        return self._admission.wait_estimate_s

    @property
    def trusted(self) -> bool:
        """Whether the model has not failed again and again."""
        return not self._breaker.open

    def on_change(self, observer: Callable[[], None]) -> None:
        """Call an observer whenever `trusted` changes."""
        self._breaker.on_change(observer)

    def open(self) -> None:
        """Begin to admit, and show it in the metrics."""
        self._admission.open()

    def show(self) -> None:
        """Let the metrics show this queue from now on."""
        self._admission.show()

    def begin_drain(self) -> None:
        """Stop admitting; `run` returns once everything admitted has its answer."""
        self._admission.drain()
        self._wakeup.set()

    def close(self) -> None:
        """Forget the runners, once `run` has returned: who still holds this holds none of them."""
        self._runners = ()

    def refusal(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Refusal | None:
        """Why so many places could not be taken now; see `AdmissionControl.refusal`."""
        return self._admission.refusal(places, timeout_s, priority, decode_s)

    def check_room(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> None:
        """Refuse what could not be admitted now; see `AdmissionControl.check_room`.

        Raises:
            ServiceError: as said there.
        """
        self._admission.check_room(places, timeout_s, priority, decode_s)

    def admit(
        self,
        places: int,
        timeout_s: float | None = None,
        request_id: str = "",
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Admission:
        """Take places in the queue for a request; see `AdmissionControl.admit`.

        Raises:
            ServiceError: as said there.
        """
        return self._admission.admit(places, timeout_s, request_id, priority, decode_s)

    @asynccontextmanager
    async def ahead(self, place: HeldPlace, deadline: float) -> AsyncIterator["Turn"]:
        """Wait until few enough images are decoded and not yet answered.

        An image is decoded and submitted in this context, its turn. Turns are given in the order
        of the queue.

        Args:
            place: of the image in the queue.
            deadline: loop time after which the answer is of no use, seconds.

        Raises:
            DeadlineExceeded: the deadline passed first.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._ahead.acquire(place.priority, place.due)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the image was decoded") from None
        try:
            yield self._turn
        finally:
            self._ahead.release()

    async def submit(
        self, item: Item, admission: Admission, deadline: float, waited_s: float = 0.0
    ) -> Served[Result]:
        """Queue one item, on a place of `admission`, and wait for its answer.

        Args:
            item: what `run_batch` takes.
            admission: holds a place for the item.
            deadline: loop time after which the answer is of no use, seconds.
            waited_s: how long it has waited for the device already, seconds.

        Raises:
            DeadlineExceeded: the deadline passed first.
            EngineFailed: the item failed on the device.
            EngineUnavailable: the device was lost.
        """
        entry = self.enqueue(item, admission, perf_counter() - waited_s, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                return await entry.future
        except TimeoutError:
            raise too_late() from None
        finally:
            if self.withdraw(entry):
                admission.give_back()

    def enqueue(
        self, item: Item, place: HeldPlace, enqueued_at: float, deadline: float
    ) -> Entry[Item, Result]:
        """Queue one item; its answer will be in the future of the entry.

        Args:
            item: what `run_batch` takes.
            place: of the item; is given back when it leaves for the device.
            enqueued_at: perf_counter, seconds.
            deadline: loop time after which the answer is of no use, seconds.
        """
        future = asyncio.get_running_loop().create_future()
        entry = Entry[Item, Result](item, place, future, enqueued_at, deadline)
        self._queue.add(entry, place.priority, place.due)
        self._in_flight.note(len(self._queue) + self._running, perf_counter())
        self._wakeup.set()
        if len(self._queue) >= self._max_batch:
            self._dispatch.reconsider()
        return entry

    def withdraw(self, entry: Entry[Item, Result]) -> bool:
        """Note that nobody waits for an entry, and say whether it still was in the queue."""
        entry.left = True
        return self._queue.discard(entry)

    async def run(self) -> None:
        """Serve batches until drained."""
        async with asyncio.TaskGroup() as batches:
            recovering = batches.create_task(self._recover())
            while await self._wait_for_work():
                if (unavailable := self._unavailable()) is not None:
                    self._refuse_waiting(unavailable)
                    continue
                asked = perf_counter()
                try:
                    # The batch is taken when a device has a place for it: it gathers until then.
                    place = await self._dispatch.place(self._full, self._share)
                except EngineUnavailable:
                    continue
                batches.create_task(self._serve(self._take(place), place, asked))
            recovering.cancel()

    def _unavailable(self) -> EngineUnavailable | None:
        """Why nothing can be run now, if so."""
        if not self._dispatch.available:
            return no_device()
        return self._breaker.error() if self._breaker.open else None

    def _refuse_waiting(self, error: EngineUnavailable) -> None:
        for entry in list(self._queue):
            self._queue.discard(entry)
            entry.place.give_back()
            if not entry.future.done():
                entry.future.set_exception(error.again())

    async def _recover(self) -> None:
        """Try a blank item from time to time while the breaker is open."""
        while True:
            await self._breaker.opened()
            await asyncio.sleep(self._breaker.pause_s)
            try:
                with await self._dispatch.place(lambda: True, self._share) as place:
                    await self._try_blank(self._runners[place.device], place)
            except EngineUnavailable:  # no device is left, which no trial will change
                return

    async def _wait_for_work(self) -> bool:
        while not self._queue:
            if self._admission.draining and not self._admission.held:
                return False
            self._wakeup.clear()
            await self._wakeup.wait()
        return True

    def _share(self, device: int, free: int) -> Share:
        """What the next batch takes of a device."""
        now, pass_s = perf_counter(), self.forecast.compute_s(1)
        self._in_flight.note(len(self._queue) + self._running, now)
        in_flight = self._in_flight.most(now - _PASSES_REMEMBERED * pass_s)
        return self._runners[device].share(in_flight, free)

    def _take(self, place: Place) -> list[Entry[Item, Result]]:
        # Others that can begin now have as many.
        most = min(place.share.images, -(-len(self._queue) // (1 + place.beside)))
        return self._gathering.take(most)

    def _full(self) -> bool:
        if not self._goes_ahead or len(self._queue) < self._max_batch:
            return False
        groups = [self._group(entry.item) for entry in self._queue]
        return groups.count(groups[0]) >= self._max_batch

    async def _serve(self, batch: list[Entry[Item, Result]], place: Place, asked: float) -> None:
        with place:
            if batch:
                runner = self._runners[place.device]
                full = len(batch) == place.share.images
                self._metrics.batches["full" if full else "idle"].inc()
                await self._answer(batch, runner, place, asked)
                await runner.settle()
                if self._breaker.suspect:
                    await self._try_blank(runner, place)

    async def _try_blank(self, runner: Runner, place: Place) -> None:
        """Let a blank item decide whether the model is to be trusted."""
        try:
            await runner.probe(place.share.cores)
        except EngineUnavailable:
            return  # the device is at fault, and says so itself
        except Exception:
            if self.trusted:
                log.exception("model out of use")
            self._breaker.convict()
        else:
            if not self.trusted:
                log.info("model in use again")
            self._breaker.worked()

    async def _answer(
        self,
        batch: list[Entry[Item, Result]],
        runner: Runner,
        place: Place,
        asked: float,
    ) -> None:
        """Run a batch, and where it fails its parts; every entry has its answer then."""
        group = self._group(batch[0].item)
        parts, since = deque([batch]), 0.0
        worked, failed_at = False, inf
        while parts:
            wanted = self._still_wanted(parts.popleft())
            fits = self._fit.limit(group)
            part, rest = wanted[:fits], wanted[fits:]
            parts.extendleft([rest] if rest else [])
            if not part:
                continue
            try:
                await self._run_part(part, runner, place, since, asked)
            except EngineUnavailable as lost:
                self._metrics.batch_failures[lost.cause].inc()
                for entry in chain(part, *parts):
                    fail(entry, lost.again())
                return
            except Exception as cause:  # the one broad except: a bad batch must not end the loop
                # One traceback is enough for a batch and its parts.
                first = failed_at == inf
                log.warning(
                    "batch failed",
                    **runner.describe(len(part)),
                    images=len(part),
                    # In order; one request may have several images in the batch.
                    requests=list(dict.fromkeys(entry.place.request_id for entry in part)),
                    error=repr(cause),
                    exc_info=first,
                )
                failed_at = min(failed_at, perf_counter())
                parts.extendleft(reversed(self._halves(part, cause, failed_at)))
            else:
                worked = True
                self._fit.worked(group, len(part))
            since = perf_counter()
        if worked:
            self._breaker.worked()
        elif failed_at < inf:
            self._breaker.failed()

    def _halves(
        self, part: list[Entry[Item, Result]], cause: Exception, failed_at: float
    ) -> list[list[Entry[Item, Result]]]:
        """What is still to be tried of a part that failed; what is not has its answer."""
        size, half = len(part), len(part) // 2
        no_memory = isinstance(cause, OutOfMemory)
        self._metrics.batch_failures["out_of_memory" if no_memory else "error"].inc()
        if no_memory and size > 1:
            self._fit.failed(self._group(part[0].item), size)
        if size > 1 and (no_memory or perf_counter() - failed_at < _ISOLATE_S):
            return [part[:half], part[half:]]
        for entry in part:
            fail(entry, _failure(cause))
        return []

    def _still_wanted(self, part: list[Entry[Item, Result]]) -> list[Entry[Item, Result]]:
        now = asyncio.get_running_loop().time()
        wanted = []
        for entry in part:
            if entry.alive(now):
                wanted.append(entry)
            else:
                fail(entry, too_late())
        return wanted

    async def _run_part(
        self,
        part: list[Entry[Item, Result]],
        runner: Runner,
        place: Place,
        since: float,
        asked: float,
    ) -> None:
        size = len(part)
        self._places.changed_running(size)
        self._running += size
        self.forecast.batch_began()
        try:
            results = await runner.run_batch([entry.item for entry in part], place.share.cores)
            answers = list(zip(part, results, strict=True))
        finally:
            self._running -= size
            self._places.changed_running(-size)
        began = max(place.began, since)
        compute_s = perf_counter() - began
        self._account(size, place, compute_s, asked)
        for entry, result in answers:
            # A caller can leave while its batch runs; to answer it would raise and end the loop.
            if entry.left or entry.future.done():
                self._metrics.abandoned.inc()
            if not entry.future.done():
                queue_s = began - entry.enqueued_at
                entry.future.set_result(Served(result, queue_s, compute_s, size))

    def _account(self, size: int, place: Place, compute_s: float, asked: float) -> None:
        self._metrics.batch_took(size, compute_s)
        self._metrics.busy_seconds[place.device].inc(place.part * compute_s)
        # Under load the time between the ends of two batches, on whichever devices they were,
        # and with the time in which other models had those, or images were still to be decoded.
        now = perf_counter()
        since = self._served_at if self._crowded else max(asked, self._served_at)
        self.forecast.batch_ended(size, compute_s, now - since, crowded=self._crowded)
        self._served_at = now
        self._crowded = self._places.count().held >= self._max_batch


def _failure(cause: Exception) -> ServiceError:
    """What the caller of an item is told; one for each, because tracebacks grow."""
    error = (
        OutOfMemory(str(cause))
        if isinstance(cause, OutOfMemory)
        else EngineFailed("the image failed on the device")
    )
    error.__cause__ = cause
    return error
