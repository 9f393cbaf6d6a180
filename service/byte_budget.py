"""How many bytes of requests may be in memory at a time, over all transports."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from prometheus_client import Gauge

from service.errors import Overloaded
from service.priority import Priority, fits

RETRY_AFTER_S = 1.0  # an upload is gone as soon as its images are decoded
# An upload is not called late before, seconds.
_PATIENCE_S = 2.0


class ByteBudget:
    """Bounds the bytes that are received and not yet decoded.

    What a request announces is held before it comes. Where bytes are short, uploads that come too
    slowly to be there in time give way to others, so that nobody keeps the others out by heads
    that announce much.

    Args:
        limit: bytes.
        held: shows how many are held.
        within_s: how long an upload may take, seconds, where others want its bytes.
    """

    def __init__(self, limit: int, held: Gauge, *, within_s: float) -> None:
        self.limit = limit
        self.within_s = within_s
        self.uploads: dict[HeldBytes, None] = {}  # those that are coming and did not give way
        self._held = 0
        self._held_low = 0  # by the lower class
        self._gauge = held
        self._given_back = asyncio.Event()

    def hold(self, size: int = 0, priority: Priority = "high") -> "HeldBytes":
        """Hold bytes for one request, until the end of the context that this is.

        Args:
            size: of the request as far as it is known, bytes.
            priority: its class as far as it is known.

        Raises:
            Overloaded: with these bytes more than the limit would be held.
        """
        held = HeldBytes(self, priority)
        held.grow(size)
        return held

    def change(self, size: int, priority: Priority) -> None:
        """Count bytes that came, or with a negative size went.

        Raises:
            Overloaded: with these bytes more than the limit would be held.
        """
        if size > 0 and not self._fits(size, priority):
            self._make_room(size, priority)
        if size > 0 and not self._fits(size, priority):
            raise Overloaded(
                f"requests of {self._held} bytes are being received; the limit is {self.limit}",
                retry_after_s=RETRY_AFTER_S,
            )
        self._held += size
        if priority == "low":
            self._held_low += size
        self._gauge.set(self._held)
        if size < 0:
            self._given_back.set()

    def _fits(self, size: int, priority: Priority) -> bool:
        return fits(size, priority, held=self._held, held_low=self._held_low, limit=self.limit)

    def _make_room(self, size: int, priority: Priority) -> None:
        """Let late uploads give way, the largest first, until so many bytes more could be held."""
        now = asyncio.get_running_loop().time()
        late = [upload for upload in self.uploads if upload.is_late(now)]
        for upload in sorted(late, key=lambda upload: upload.size, reverse=True):
            if self._fits(size, priority):
                return
            upload.give_way(now)

    async def room(self, size: int) -> None:
        """Wait until so many more bytes could be held; for whoever can let its caller wait."""
        while self._held + size > self.limit:
            self._given_back.clear()
            await self._given_back.wait()


class HeldBytes:
    """What one request holds of the budget; given back at the end of the context."""

    def __init__(self, budget: ByteBudget, priority: Priority) -> None:
        self._budget = budget
        self._priority: Priority = priority
        self.size = 0
        self._came = 0  # bytes of the upload
        self._began = 0.0  # loop time, seconds
        self._coming: asyncio.Timeout

    @property
    def free(self) -> int:
        """What would be left of the budget if there were no other request, bytes."""
        return self._budget.limit - self.size

    def grow(self, size: int) -> None:
        """Hold more bytes.

        Raises:
            Overloaded: so many more would be too many; what was held stays held.
        """
        self._budget.change(size, self._priority)
        self.size += size

    def give_back(self, size: int) -> None:
        """Hold fewer bytes."""
        assert size <= self.size, "bytes were given back twice: this is a bug"
        self.size -= size
        self._budget.change(-size, self._priority)

    def resize(self, size: int) -> None:
        """Hold so many bytes instead.

        Raises:
            Overloaded: they are too many; what was held stays held.
        """
        self.grow(size - self.size)

    @asynccontextmanager
    async def coming(self) -> AsyncIterator[None]:
        """The request is being received; `came` says what of it is there.

        Raises:
            Overloaded: it gave way to others.
        """
        self._began = asyncio.get_running_loop().time()
        self._coming = asyncio.timeout(None)
        uploads = self._budget.uploads
        try:
            async with self._coming:
                uploads[self] = None
                yield
        except TimeoutError:
            if not self._coming.expired():
                raise
            raise Overloaded(
                "the request came too slowly, and others wanted its place in memory", RETRY_AFTER_S
            ) from None
        finally:
            uploads.pop(self, None)

    def came(self, size: int) -> None:
        """Count bytes of the request that were received."""
        self._came += size

    def is_late(self, now: float) -> bool:
        """Whether at its pace the request would not be there in time; `now` is loop time."""
        age = now - self._began
        return age > _PATIENCE_S and self._came * self._budget.within_s < self.size * age

    def give_way(self, now: float) -> None:
        """Give back what is held, and stop receiving; `now` is loop time."""
        del self._budget.uploads[self]
        self.give_back(self.size)
        self._coming.reschedule(now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_back(self.size)
