"""Who waits for something, and who is next: two classes, with ageing."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from heapq import merge
from operator import itemgetter
from typing import Generic, TypeVar

from service.priority import Priority

T = TypeVar("T")


class Waiting(Generic[T]):
    """Those who wait, the upper class before the lower, each in the order in which they came.

    Each is due at some time: one of the upper class when it came, one of the lower class later.
    From that time on the lower one counts as if it were of the upper class and came then, so that
    it waits for a bounded time however many of the upper class come.
    """

    def __init__(self) -> None:
        # Of each when it is due.
        self._high: OrderedDict[T, float] = OrderedDict()
        self._low: OrderedDict[T, float] = OrderedDict()

    def add(self, one: T, priority: Priority, due: float) -> None:
        """Let one wait behind those of its class.

        Args:
            one: who waits; hashable.
            priority: its class.
            due: any clock, seconds; the same for all.
        """
        (self._high if priority == "high" else self._low)[one] = due

    def discard(self, one: T) -> bool:
        """Let one wait no longer, and say whether it did."""
        of_class = self._high if one in self._high else self._low
        return of_class.pop(one, None) is not None

    def __len__(self) -> int:
        return len(self._high) + len(self._low)

    def __iter__(self) -> Iterator[T]:
        """Everybody, who is next first; whoever removes some goes over a copy."""
        if not self._low:
            return iter(self._high)
        if not self._high:
            return iter(self._low)
        return (one for one, _ in merge(self._high.items(), self._low.items(), key=itemgetter(1)))

    def holds(self, priority: Priority) -> bool:
        """Whether anybody of a class waits."""
        return bool(self._high if priority == "high" else self._low)


class Turns:
    """A bounded number of turns at something, and those who wait for one.

    Args:
        turns: that are given out at a time.
        kept: that are given out beyond that while any of the upper class waits: however many of
            the lower class came first, the upper one does not wait until one of them is done.
    """

    def __init__(self, turns: int, kept: int) -> None:
        self._turns = turns
        self._kept = kept
        self._taken = 0
        self._waiting: Waiting[asyncio.Future[None]] = Waiting()

    async def acquire(self, priority: Priority, due: float) -> None:
        """Wait for a turn; the arguments are those of `Waiting.add`."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.add(turn, priority, due)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            else:
                self._waiting.discard(turn)
            raise

    def release(self) -> None:
        """Give a turn back."""
        self._taken -= 1
        self._give()

    def _give(self) -> None:
        while (turn := self._next()) is not None:
            self._waiting.discard(turn)
            if not turn.done():
                self._taken += 1
                turn.set_result(None)

    def _next(self) -> asyncio.Future[None] | None:
        """Who gets a turn now, if anybody can."""
        # Whoever of the lower class is before one of the upper class counts as such.
        upper = self._waiting.holds("high")
        free = self._taken < self._turns + self._kept * upper
        return next(iter(self._waiting), None) if free else None
