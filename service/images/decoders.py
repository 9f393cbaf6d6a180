"""Which image is decoded next: small ones first, none for ever last, and bounded in pixels.

Those of the lower class are due when they count as upper ones, so the upper class is first.

Decoding costs what an image has of pixels, not of bytes: 84 kB can hold 1.6 gigapixels. Each image
is due the later the more pixels it and the images before it in its request have, and the one that
is due first is next. So a small image waits for at most the image that each thread has in hand, a
request with many images takes turns with the others, and a large image has its turn in the end.

No more threads decode than the waiting images keep busy. Each of them takes the lock of the
interpreter many times for an image; where many threads do, the whole process waits for that lock
and for cores to wake up.
"""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from prometheus_client import Gauge

from service.errors import Overloaded
from service.priority import Priority, fits

T = TypeVar("T")

RETRY_AFTER_S = 1.0
# Slower than any decoder: an image of 50 megapixels takes a second and is due after ten.
_DUE_PIXELS_PER_S = 5e6
# Pixels that are worth a thread: milliseconds of decoding, where to wake it takes a tenth of one.
_PIXELS_OF_THREAD = 250_000
_SMOOTHING = 0.1  # share of the newest image in what is known of their speed


@dataclass(order=True)
class _Job:
    """An image that waits for a thread.

    Attributes:
        due: loop time, seconds.
        number: among jobs that are due at the same time, the one that came earlier is first.
        pixels: an image with so many would take as long to decode.
        share: how much of a thread it keeps busy, pixels; at most all of one.
    """

    due: float
    number: int
    pixels: int = field(compare=False)
    share: int = field(compare=False)
    work: Callable[[], Any] = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)


class Decoders:
    """Threads that decode, and the line before them; the end of the context ends them.

    All work comes from one event loop.

    Args:
        pool: of the threads.
        threads: how many it has.
        max_pixels: most pixels of the images that wait or are being decoded.
        in_flight: shows those pixels.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, threads: int, max_pixels: int, in_flight: Gauge
    ) -> None:
        self.pool = pool
        self._threads = threads
        self._max_pixels = max_pixels
        self._gauge = in_flight
        self._pixels = 0
        self._pixels_low = 0  # those of the lower class
        # Of recent images, the newest of which count most.
        self._decoded_pixels = self._decoding_s = 0.0
        self._numbers = itertools.count()
        self._lock = Lock()
        self._line: list[_Job] = []
        self._awake = 0  # threads
        self._shares = 0  # of what waits or is in hand
        self._untold: list[tuple[asyncio.Future[Any], object, Exception | None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pool.shutdown()

    def request(
        self, pixels: int, priority: Priority = "high", due: float | None = None
    ) -> "DecodingRequest":
        """The images of one request, as the context in which they are decoded.

        Args:
            pixels: of all its images.
            priority: its class.
            due: from when on it counts as one of the upper class, loop time, seconds; `None`
                means from now on.

        Raises:
            Overloaded: with these pixels more than `max_pixels` would wait.
        """
        held, low, limit = self._pixels, self._pixels_low, self._max_pixels
        # When nothing else waits, a request within its own limits is always taken.
        if held and not fits(pixels, priority, held=held, held_low=low, limit=limit):
            raise Overloaded(
                f"images of {held} pixels wait to be decoded; the limit is {limit}",
                retry_after_s=max(RETRY_AFTER_S, self.wait_s(priority)),
            )
        return DecodingRequest(self, pixels, priority, due)

    def change(self, pixels: int, priority: Priority) -> None:
        """Count pixels that came, or with a negative number went."""
        self._pixels += pixels
        if priority == "low":
            self._pixels_low += pixels
        self._gauge.set(self._pixels)

    def wait_s(self, priority: Priority = "high", images: Sequence[int] = ()) -> float:
        """Time until the images of a request that comes now would be decoded, seconds.

        0 where nothing was decoded yet.

        Args:
            priority: its class.
            images: pixels of each; none asks for those before it alone.
        """
        if not self._decoded_pixels:
            return 0.0
        before = self._pixels if priority == "low" else self._pixels - self._pixels_low
        pixels = before + sum(images)
        threads = min(self._threads, 1 + pixels // _PIXELS_OF_THREAD)
        return (
            max(pixels / threads, max(images, default=0)) * self._decoding_s / self._decoded_pixels
        )

    async def run(self, due: float, work: Callable[[], T], pixels: int = _PIXELS_OF_THREAD) -> T:
        """Do work in a thread when nothing waits that is due earlier.

        Args:
            due: loop time, seconds.
            work: what the thread does.
            pixels: an image with so many would take as long to decode.
        """
        share = min(pixels, _PIXELS_OF_THREAD)
        result = asyncio.get_running_loop().create_future()
        job = _Job(due, next(self._numbers), pixels, share, work, result)
        with self._lock:
            heapq.heappush(self._line, job)
            self._shares += share
            wake = not self._awake or self._shares > self._awake * _PIXELS_OF_THREAD
            self._awake += wake
        if wake:
            self.pool.submit(self._do_all)
        return cast("T", await result)

    async def run_now(self, work: Callable[[], T]) -> T:
        """Do work in the next thread that is free, before anything that is to be decoded."""
        return await self.run(-inf, work)

    def _do_all(self) -> None:
        """Do the job that is due first, until none waits.

        A thread that is done takes the next job itself: to wait for the event loop to hand it over
        would take longer, on a busy one, than to decode a small image.
        """
        while (job := self._next()) is not None:
            start = perf_counter()
            try:
                done, error = job.work(), None
            except Exception as fault:  # whatever it is, the caller who waits gets it
                done, error = None, fault
            self._ended(job, done, error, perf_counter() - start)

    def _next(self) -> _Job | None:
        """The job that is due first, of those whose callers are still there."""
        with self._lock:
            while self._line:
                job = heapq.heappop(self._line)
                if not job.result.done():
                    return job
                self._shares -= job.share
            self._awake -= 1
            return None

    def _ended(self, job: _Job, done: object, error: Exception | None, seconds: float) -> None:
        with self._lock:
            self._shares -= job.share
            if error is None and job.due > -inf:
                self._decoded_pixels += _SMOOTHING * (job.pixels - self._decoded_pixels)
                self._decoding_s += _SMOOTHING * (seconds - self._decoding_s)
            first = not self._untold
            self._untold.append((job.result, done, error))
        if first:  # the event loop is woken once for all that end before it turns to them
            job.result.get_loop().call_soon_threadsafe(self._tell_all)

    def _tell_all(self) -> None:
        with self._lock:
            untold, self._untold = self._untold, []
        for result, done, error in untold:
            _tell(result, done, error)


def _tell(result: asyncio.Future[Any], done: object, error: Exception | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(done)
    else:
        result.set_exception(error)


class DecodingRequest:
    """The images of one request on their way through the decoders.

    Args:
        decoders: that they take turns at.
        pixels: of all its images.
        priority: its class.
        due: from when on it counts as one of the upper class, loop time, seconds; `None` means
            from now on.
    """

    def __init__(
        self, decoders: Decoders, pixels: int, priority: Priority, due: float | None
    ) -> None:
        self._decoders = decoders
        self._pixels = pixels
        self._priority = priority
        self._due = asyncio.get_running_loop().time() if due is None else due

    async def run(self, pixels: int, work: Callable[[], T]) -> T:
        """Decode the next image of the request, in its turn among those of all requests."""
        self._due += pixels / _DUE_PIXELS_PER_S
        try:
            return await self._decoders.run(self._due, work, pixels)
        finally:
            self._give_back(pixels)

    def _give_back(self, pixels: int) -> None:
        self._pixels -= pixels
        self._decoders.change(-pixels, self._priority)

    def __enter__(self) -> Self:
        self._decoders.change(self._pixels, self._priority)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back(self._pixels)
