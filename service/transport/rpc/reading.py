"""Reads the messages of gRPC calls, a bounded number at a time."""

import asyncio
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


class Reading:
    """Bounds the messages that are being received.

    gRPC tells the size of a message when all of it is in memory, so what is bounded is how many
    are on their way. A message that has not begun to be read waits in the flow control of its
    stream. When all places are taken and others wait, those who read longest are cut off, so
    that callers who send slowly or not at all never keep the others out.

    Args:
        places: messages that are read at a time.
        patience_s: how long one may take while others wait, seconds.
        timeout_s: how long one may take, and how long it may wait for a place, seconds.
    """

    def __init__(self, places: int, *, patience_s: float, timeout_s: float) -> None:
        self._places = asyncio.Semaphore(places)
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
        await self._take_place()
        try:
            return await self._read(context)
        finally:
            self._places.release()

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

    async def _take_place(self) -> None:
        if not self._places.locked():
            await self._places.acquire()
            return
        self._waiting += 1
        self._hurry()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._places.acquire()
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
