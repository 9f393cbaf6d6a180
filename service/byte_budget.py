"""How many bytes of requests may be in memory at a time, over all transports."""

import asyncio
from types import TracebackType
from typing import Self

from prometheus_client import Gauge

from service.errors import Overloaded
from service.priority import Priority, fits

RETRY_AFTER_S = 1.0  # an upload is gone as soon as its images are decoded


class ByteBudget:
    """Bounds the bytes that are received and not yet decoded.

    Args:
        limit: bytes.
        held: shows how many are held.
    """

    def __init__(self, limit: int, held: Gauge) -> None:
        self.limit = limit
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
        held, low, limit = self._held, self._held_low, self.limit
        if size > 0 and not fits(size, priority, held=held, held_low=low, limit=limit):
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_back(self.size)
