"""Reads the messages of gRPC calls, a bounded number at a time."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice
from typing import Any

import grpc

from service.byte_budget import RETRY_AFTER_S
from service.errors import DeadlineExceeded, InvalidRequest, Overloaded

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(eq=False)
class _Reader:
    began: float  # loop time, seconds
    scope: asyncio.Timeout
    hurried: bool = False


class _Places:
    """A bounded number of places, and those who wait for one: their connections take turns.

    Among the calls of one connection the first is next. So whoever opens many calls and sends
    nothing waits for himself, and everybody else for one of them at most.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        # By connection, the one that is next first, each with its calls in order of arrival.
        self._waiting: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()

    def take_free(self) -> bool:
        """Take a place if one is free, and say whether it was."""
        taken = self._free > 0
        self._free -= taken
        return taken

    async def wait(self, connection: str) -> None:
        """Take the next place that this connection is given."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(connection, OrderedDict())[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()
            else:
                self._forget(connection, turn)
            raise

    def give_back(self) -> None:
        """Give a place to who is next, if anybody waits."""
        while self._waiting:
            connection, line = self._waiting.popitem(last=False)
            turn, _ = line.popitem(last=False)
            if line:
                self._waiting[connection] = line
            if not turn.done():  # or its caller has just left
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, connection: str, turn: asyncio.Future[None]) -> None:
        line = self._waiting.get(connection)
        if line is not None:
            line.pop(turn, None)
            if not line:
                del self._waiting[connection]


class Reading:
    """Bounds the messages that are being received.

    gRPC tells the size of a message when all of it is in memory, so what is bounded is how many
    are on their way. A message that has not begun to be read waits in the flow control of its
    stream. When all places are taken and others wait, those who read longest are cut off, and
    connections take turns, so that callers who send slowly or not at all never keep the others
    out.

    Args:
        places: messages that are read at a time.
        patience_s: how long one may take while others wait, seconds.
        timeout_s: how long one may take, and how long it may wait for a place, seconds.
    """

    def __init__(self, places: int, *, patience_s: float, timeout_s: float) -> None:
        self._places = _Places(places)
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._waiting = 0
        self._readers: dict[_Reader, None] = {}  # in the order in which they began

    async def read(self, context: Context) -> bytes | None:
        """The next message of a call; none at the end of what its caller sends.

        Raises:
            Overloaded: no place came free in time, or the message did not come while others waited.
            DeadlineExceeded: the message did not come in time.
        """
        await self._take_place(context)
        try:
            return await self._read(context)
        finally:
            self._places.give_back()

    async def read_only(self, context: Context) -> bytes:
        """The message of a call that has one.

        Raises:
            Overloaded: no place came free in time, or the message did not come while others waited.
            DeadlineExceeded: the message did not come in time.
            InvalidRequest: the caller sent none.
        """
        message = await self.read(context)
        if message is None:
            raise InvalidRequest("the call holds no message")
        return message

    async def _take_place(self, context: Context) -> None:
        if self._places.take_free():
            return
        self._waiting += 1
        self._hurry()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._places.wait(context.peer())
        except TimeoutError:
            raise Overloaded("too many messages are being received", RETRY_AFTER_S) from None
        finally:
            self._waiting -= 1

    async def _read(self, context: Context) -> bytes | None:
        scope = asyncio.timeout(self._timeout_s)
        reader = _Reader(asyncio.get_running_loop().time(), scope)
        try:
            async with scope:
                self._readers[reader] = None
                self._hurry()
                message = await context.read()
        except TimeoutError:
            if reader.hurried:
                raise Overloaded(
                    f"the message did not come within {self._patience_s} s, and others wait",
                    RETRY_AFTER_S,
                ) from None
            raise DeadlineExceeded(f"the message did not come within {self._timeout_s} s") from None
        finally:
            del self._readers[reader]
        return None if message is grpc.aio.EOF else message

    def _hurry(self) -> None:
        """Give the oldest readers, one for each who waits, no more time than patience."""
        now = asyncio.get_running_loop().time()
        for reader in islice(self._readers, self._waiting):
            if not reader.hurried and not reader.scope.expired():
                reader.hurried = True
                reader.scope.reschedule(max(now, reader.began + self._patience_s))
