"""How calls are answered, and what becomes of them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from math import ceil
from time import perf_counter
from typing import Any

import grpc
import structlog

from service.errors import ServiceError
from service.metrics.replica import Metrics
from service.security.access import CREDENTIALS, Access, Caller
from service.transport import request_id
from service.transport.rpc.last_calls import LastCalls
from service.transport.rpc.reading import Context
from service.transport.rpc.untaken import until_done
from service.transport.unread import UnreadAnswers

# What answers a call, from its context: bytes, or nothing where it wrote its answers itself.
Answer = Callable[[Context], Awaitable[Any]]

_HEAR_OUT_S = 1.0
_HEARD_AT_A_TIME = 8

log = structlog.get_logger(__name__)


def one_answer(answer: Answer) -> "grpc.RpcMethodHandler[Any, Any]":
    """A method with one answer, whose requests come as bytes."""

    async def serve(_: object, context: Context) -> bytes:
        return await answer(context) or b""

    return grpc.stream_unary_rpc_method_handler(serve)


def many_answers(
    answer: Answer, serializer: Callable[[Any], bytes] | None = None
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A method that writes its answers itself."""

    async def serve(_: object, context: Context) -> None:
        await answer(context)

    return grpc.stream_stream_rpc_method_handler(serve, response_serializer=serializer)


def heard_out(answer: Answer) -> Answer:
    """Answer a stream; if it fails, read on for a while what its caller still sends.

    A client whose sending fails may take that for the end of the call, and not see its status.
    What is read costs memory, so that few are heard out at a time.
    """
    free = asyncio.Semaphore(_HEARD_AT_A_TIME)

    async def serve(context: Context) -> None:
        try:
            await answer(context)
        except ServiceError:
            if not free.locked():
                async with free:
                    await _hear_out(context)
            raise

    return serve


async def _hear_out(context: Context) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_HEAR_OUT_S):
            while await context.read() is not grpc.aio.EOF:
                pass


async def _refuse(
    context: Context, error: ServiceError, metadata: tuple[tuple[str, str], ...] = ()
) -> None:
    """End a call with a failure."""
    told = [*metadata, ("dat-error-code", error.code)]
    if error.retry_after_s is not None:
        # What gRPC's own retry policies obey (proposal A6).
        told.append(("grpc-retry-pushback-ms", str(max(1, ceil(error.retry_after_s * 1e3)))))
    await _abort(context, error.grpc_code, str(error), tuple(told))


async def _abort(
    context: Context, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    """End a call; the caller of this is to return.

    To set the code and return would send an empty answer first, after which gRPC's clients do not
    try again. gRPC keeps the exception of an abort with the call, and raises it once more on
    return; with a traceback it would hold the frames, and with those the call.
    """
    try:
        await context.abort(code, details, metadata)
    except grpc.aio.AbortError as aborted:
        aborted.__traceback__ = None


def uncounted(answer: Answer) -> Answer:
    """Answer a probe or a reflection call, which is not counted, and show why it failed."""

    async def serve(context: Context) -> Any:
        try:
            return await answer(context)
        except ServiceError as error:
            failure = error.with_traceback(None)
        except grpc.aio.AbortError as aborted:  # gRPC keeps it
            aborted.__traceback__ = None
            return None
        await _refuse(context, failure)
        return None

    return serve


def admitted(access: Access, answer: Answer) -> Answer:
    """Answer a call if its caller may ask; nothing that it sends is read before."""

    async def serve(context: Context) -> Any:
        caller = access.admit(_headers(context))
        if isinstance(caller, ServiceError):
            raise caller
        return await answer(context)

    return serve


def caller_of(access: Access, context: Context) -> Caller:
    """Who asks; a stream may go on when its key is known no more.

    Raises:
        Unauthenticated: the key is not known.
    """
    caller = access.identify(_headers(context))
    if isinstance(caller, ServiceError):
        raise caller
    return caller


def _headers(context: Context) -> list[tuple[bytes, bytes]]:
    return [
        (name.encode(), value.encode() if isinstance(value, str) else value)
        for name, value in context.invocation_metadata() or ()
        if name in CREDENTIALS
    ]


class Calls:
    """What calls have in common: who may ask, and what became of them, told and counted."""

    def __init__(
        self, metrics: Metrics, access: Access, last_calls: LastCalls, unread: UnreadAnswers
    ) -> None:
        self._responses = metrics.responses
        self._access = access
        self._last_calls = last_calls
        self._unread = unread

    def counted(self, method: str, answer: Answer, *, stream: bool = False) -> Answer:
        """Answer a call if its caller may ask, show what became of it, and count that.

        Args:
            method: its name in the log.
            answer: what answers it.
            stream: whether its caller may send on after a failure, and is heard out.
        """
        answer = admitted(self._access, answer)
        if stream:
            answer = heard_out(answer)

        async def serve(context: Context) -> Any:
            identity, start = _choose_identity(context), perf_counter()
            metadata = ((request_id.HEADER, identity),)
            context.set_trailing_metadata(metadata)
            code = grpc.StatusCode.OK
            failure: ServiceError | None = None
            try:
                await self._last_calls.enter()
                return self._until_taken(await answer(context), context)
            except ServiceError as error:
                code = error.grpc_code
                failure = error.with_traceback(None)
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            except Exception:  # gRPC would show the caller the text of a bug
                code = grpc.StatusCode.INTERNAL
                log.exception("request failed", request_id=identity)
            finally:
                self._log(method, code, start, identity)
            if failure is None:
                await _abort(context, code, "internal error", metadata)
            else:
                await _refuse(context, failure, metadata)
            return None

        return serve

    def _until_taken(self, answered: bytes | None, context: Context) -> bytes | None:
        if answered is not None:
            until_done(self._unread, context, len(answered))
        return answered

    def _log(self, method: str, code: grpc.StatusCode, start: float, identity: str) -> None:
        self._responses.labels("grpc", code.name).inc()
        log.info(
            "request",
            method=method,
            status=code.name,
            duration_s=round(perf_counter() - start, 4),
            request_id=identity,
        )


def identity_of(context: Context) -> str:
    """The id of a call that is counted: the one that its answer shows."""
    return str(dict(context.trailing_metadata() or ())[request_id.HEADER])


def metadata_of(context: Context, key: str) -> str | None:
    """What the caller of a call sent under a key that does not end in `-bin`, if anything."""
    given = dict(context.invocation_metadata() or ()).get(key)
    # Only keys that end in -bin have values of bytes.
    assert not isinstance(given, bytes)
    return given


def _choose_identity(context: Context) -> str:
    return request_id.choose(metadata_of(context, request_id.HEADER) or "")
