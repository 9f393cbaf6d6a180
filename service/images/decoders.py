"""Which image is decoded next: small ones first, none for ever last, and bounded in pixels.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from prometheus_client import Gauge

from service.errors import Overloaded

T = TypeVar("T")

RETRY_AFTER_S = 1.0
# Slower than any decoder: an image of 50 megapixels takes a second and is due after ten.
_DUE_PIXELS_PER_S = 5e6
# Pixels that are worth a thread: milliseconds of decoding, where to wake it takes a tenth of one.
_PIXELS_OF_THREAD = 250_000


@dataclass(order=True)
class _Job:
    """An image that waits for a thread.

    Attributes:
        due: loop time, seconds.
        number: among jobs that are due at the same time, the one that came earlier is first.
        share: how much of a thread it keeps busy, pixels; at most all of one.
    """

    due: float
    number: int
    share: int = field(compare=False)
    work: Callable[[], Any] = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)


class Decoders:
    """Threads that decode, and the line before them; the end of the context ends them.

    All work comes from one event loop.

    Args:
        pool: of the threads.
        max_pixels: most pixels of the images that wait or are being decoded.
        in_flight: shows those pixels.
    """

    def __init__(self, pool: ThreadPoolExecutor, max_pixels: int, in_flight: Gauge) -> None:
        self.pool = pool
        self._max_pixels = max_pixels
        self._gauge = in_flight
        self._pixels = 0
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

    def request(self, pixels: int) -> "DecodingRequest":
        """The images of one request, as the context in which they are decoded.

        Args:
            pixels: of all its images.

        Raises:
            Overloaded: with these pixels more than `max_pixels` would wait.
        """
        # When nothing else waits, a request within its own limits is always taken.
        if self._pixels and self._pixels + pixels > self._max_pixels:
            raise Overloaded(
                f"images of {self._pixels} pixels wait to be decoded; "
                f"the limit is {self._max_pixels}",
                retry_after_s=RETRY_AFTER_S,
            )
        return DecodingRequest(self, pixels)

    def change(self, pixels: int) -> None:
        """Count pixels that came, or with a negative number went."""
        self._pixels += pixels
        self._gauge.set(self._pixels)

    async def run(self, due: float, work: Callable[[], T], pixels: int = _PIXELS_OF_THREAD) -> T:
        """Do work in a thread when nothing waits that is due earlier.

        Args:
            due: loop time, seconds.
            work: what the thread does.
            pixels: an image with so many would take as long to decode.
        """
        share = min(pixels, _PIXELS_OF_THREAD)
        result = asyncio.get_running_loop().create_future()
        job = _Job(due, next(self._numbers), share, work, result)
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
            try:
                done, error = job.work(), None
            except Exception as fault:  # whatever it is, the caller who waits gets it
                done, error = None, fault
            self._ended(job, done, error)

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

    def _ended(self, job: _Job, done: object, error: Exception | None) -> None:
        with self._lock:
            self._shares -= job.share
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
    """

    def __init__(self, decoders: Decoders, pixels: int) -> None:
        self._decoders = decoders
        self._pixels = pixels
        self._due = asyncio.get_running_loop().time()

    async def run(self, pixels: int, work: Callable[[], T]) -> T:
        """Decode the next image of the request, in its turn among those of all requests."""
        self._due += pixels / _DUE_PIXELS_PER_S
        try:
            return await self._decoders.run(self._due, work, pixels)
        finally:
            self._give_back(pixels)

    def _give_back(self, pixels: int) -> None:
        self._pixels -= pixels
        self._decoders.change(-pixels)

    def __enter__(self) -> Self:
        self._decoders.change(self._pixels)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back(self._pixels)
