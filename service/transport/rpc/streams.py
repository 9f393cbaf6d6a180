"""Calls that hold many requests, whose answers come as they are ready."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import grpc

from service.byte_budget import RETRY_AFTER_S, ByteBudget
from service.errors import InvalidRequest, Overloaded
from service.settings.limits import Limits
from service.transport.rpc import wire
from service.transport.rpc.reading import Context
from service.transport.rpc.untaken import being_written
from service.transport.unread import UnreadAnswers

# Requests of one stream that are worked on at a time; more wait in the flow control of HTTP/2.
_CONCURRENCY = 64

# Gives what will answer one message of a stream; raises `InvalidRequest` if that cannot be
# answered, which ends the stream.
Answering = Callable[[wire.Received], Callable[[], Awaitable[bytes]]]


class Streams:
    """The streams of one call that are open, a bounded number at a time."""

    def __init__(self, budget: ByteBudget, limits: Limits, unread: UnreadAnswers) -> None:
        self._budget = budget
        self._limits = limits
        self._unread = unread
        self._open = 0

    async def serve(self, context: Context, answer: Answering) -> None:
        """Answer the requests of a stream, a bounded number at a time, as they are ready.

        Raises:
            Overloaded: too many streams are open.
            InvalidRequest: a message cannot be answered; those before it were.
        """
        if self._open == self._limits.max_streams:
            raise Overloaded(
                f"{self._open} streams are open, which is the limit; close one, or try later",
                RETRY_AFTER_S,
            )
        self._open += 1
        try:
            await self._serve(context, answer)
        finally:
            self._open -= 1

    async def _serve(self, context: Context, answer: Answering) -> None:
        free = asyncio.Semaphore(_CONCURRENCY)
        writing = asyncio.Lock()  # gRPC allows one write at a time
        malformed: list[InvalidRequest] = []

        async def write(answering: Callable[[], Awaitable[bytes]]) -> None:
            try:
                answered = await answering()
                with being_written(self._unread, context, len(answered)):
                    async with writing:
                        # Whoever left reads no answer; gRPC then cancels this call.
                        with suppress(grpc.aio.InternalError):
                            await context.write(answered)
            finally:
                free.release()

        async with asyncio.TaskGroup() as tasks:
            await free.acquire()
            while received := await self._receive(context):
                try:
                    answering = answer(received)
                except InvalidRequest as error:  # without its id it cannot be answered
                    malformed.append(error.with_traceback(None))
                    break
                tasks.create_task(write(answering))
                del received, answering  # the next may be long in coming
                await free.acquire()
        if malformed:
            raise malformed.pop()

    async def _receive(self, context: Context) -> wire.Received | None:
        # Others may always hold some of the budget.
        await self._budget.room(min(self._limits.max_body_bytes, self._budget.limit // 2))
        message = await context.read()
        return None if message is grpc.aio.EOF else wire.Received(message)
