"""gRPC: messages to the cores and back, nothing else.

Messages are read and parsed here and not by gRPC, for which every call sends a stream of bytes;
on the wire there is no difference. So whether a request may come is asked before it is read, what
it holds is counted before it is parsed, and a malformed one has a status of its own.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from math import ceil
from time import perf_counter
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.byte_budget import RETRY_AFTER_S, ByteBudget
from service.errors import (
    DeadlineExceeded,
    ImageTooLarge,
    Internal,
    InvalidRequest,
    Overloaded,
    ServiceError,
)
from service.machine import open_files
from service.metrics import CountedRequest, Metrics, Protocol
from service.pb import dat_pb2
from service.settings import Limits, Server
from service.tasks.catalogue import Catalogue
from service.tasks.core import Core
from service.transport import request_id
from service.transport.rpc import wire
from service.transport.rpc.messages import CLASSIFY, DETECT, RESIZE_MODES, RpcTask, error_message
from service.transport.rpc.reading import Context, Reading

log = structlog.get_logger(__name__)

# What answers a call, from its context: bytes, or nothing where it wrote its answers itself.
Answer = Callable[[Context], Awaitable[Any]]

SERVICES = [service.full_name for service in dat_pb2.DESCRIPTOR.services_by_name.values()]
_IMAGES = 1  # in the requests of both tasks
_REQUEST_IN_STREAM = 2  # in the messages of both streams
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# Requests of one stream that are worked on at a time; more wait in the flow control of HTTP/2.
_STREAM_CONCURRENCY = 64
# Of a message that is not being read, gRPC keeps no more than this, bytes; most images fit in it.
_UNREAD_BYTES = 256 * 1024
# gRPC itself refuses a message without a word of ours, so it may be larger by this factor.
_RECEIVED = 2
# The images of a larger message are copied where the event loop does not wait for it.
_LARGE_MESSAGE_BYTES = 2**20
# While others wait, a message may take this long to come, seconds.
_PATIENCE_S = 2.0
_HEAR_OUT_S = 1.0
# A part of the files that may be open, so that HTTP, the metrics and the models keep theirs.
_CONNECTIONS_OF_FILES = 1 / 4
_MOST_CONNECTIONS = 1000
_HANDSHAKE_TIMEOUT_S = 10.0
_IDLE_S = 300.0
_STREAMS_OF_A_CONNECTION = 128
_METADATA_BYTES = 16 * 1024
_KEEPALIVE_TIMEOUT_S = 20.0
# Calls without images; their messages come with their headers.
_SMALL_MESSAGES = 8
_SMALL_PATIENCE_S = 0.1


class Health(health_aio.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 of the whole server and of its services, which share their state."""

    async def show(self, serving: bool) -> None:
        """Tell all who ask or watch."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", *SERVICES):
            await self.set(service, status)


def create_server(
    catalogue: Catalogue,
    health: Health,
    metrics: Metrics,
    budget: ByteBudget,
    *,
    limits: Limits,
    server: Server,
) -> grpc.aio.Server:
    """The gRPC interface over the cores, with health and reflection."""
    rpc_server = grpc.aio.server(options=_options(limits, server))
    calls = _Calls(metrics)
    timeout_s = server.grpc_message_timeout_s
    small = Reading(_SMALL_MESSAGES, patience_s=_SMALL_PATIENCE_S, timeout_s=timeout_s)
    places = max(1, budget.limit // (_RECEIVED * limits.max_body_bytes))
    large = Reading(places, patience_s=_PATIENCE_S, timeout_s=timeout_s)
    for task in (CLASSIFY, DETECT):
        requests = _TaskCalls(task, catalogue, metrics, budget, limits=limits, reading=large)
        stream = f"{task.method}Stream"
        methods = {
            task.method: _one_answer(calls.counted(task.method, requests.one)),
            stream: _many_answers(calls.counted(stream, _heard_out(requests.many))),
        }
        rpc_server.add_registered_method_handlers(task.service, methods)
    _add_models(rpc_server, catalogue, calls, small)
    _add_health(rpc_server, health, small)
    _add_reflection(rpc_server, small)
    return rpc_server


def _options(limits: Limits, server: Server) -> list[tuple[str, int]]:
    def milliseconds(seconds: float) -> int:
        return ceil(seconds * 1e3)

    options = {
        "grpc.max_receive_message_length": _RECEIVED * limits.max_body_bytes,
        # Points of many images outgrow the default of 4 MiB.
        "grpc.max_send_message_length": -1,
        # Two servers on one port would share its connections silently.
        "grpc.so_reuseport": 0,
        "grpc.max_allowed_incoming_connections": min(
            _MOST_CONNECTIONS, max(1, int(open_files() * _CONNECTIONS_OF_FILES))
        ),
        # Connections that say nothing, or have no calls for long, leave their place to others.
        "grpc.server_handshake_timeout_ms": milliseconds(_HANDSHAKE_TIMEOUT_S),
        "grpc.max_connection_idle_ms": milliseconds(_IDLE_S),
        "grpc.max_concurrent_streams": _STREAMS_OF_A_CONNECTION,
        # Between a soft limit and a hard one requests would be refused by chance.
        "grpc.max_metadata_size": _METADATA_BYTES,
        "grpc.absolute_max_metadata_size": _METADATA_BYTES,
        # Measured bandwidth would let megabytes in that nobody reads yet.
        "grpc.http2.bdp_probe": 0,
        "grpc.http2.lookahead_bytes": _UNREAD_BYTES,
        "grpc.keepalive_time_ms": milliseconds(server.grpc_keepalive_s),
        "grpc.keepalive_timeout_ms": milliseconds(_KEEPALIVE_TIMEOUT_S),
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": milliseconds(
            server.grpc_min_ping_interval_s
        ),
    }
    if server.grpc_max_connection_age_s:
        options["grpc.max_connection_age_ms"] = milliseconds(server.grpc_max_connection_age_s)
        options["grpc.max_connection_age_grace_ms"] = milliseconds(server.grpc_connection_grace_s)
    return list(options.items())


def _one_answer(answer: Answer) -> "grpc.RpcMethodHandler[Any, Any]":
    async def serve(_: object, context: Context) -> bytes:
        return await answer(context) or b""

    return grpc.stream_unary_rpc_method_handler(serve)


def _many_answers(
    answer: Answer, serializer: Callable[[Any], bytes] | None = None
) -> "grpc.RpcMethodHandler[Any, Any]":
    async def serve(_: object, context: Context) -> None:
        await answer(context)

    return grpc.stream_stream_rpc_method_handler(serve, response_serializer=serializer)


def _heard_out(answer: Answer) -> Answer:
    """Answer a stream; if it fails, read on for a while what its caller still sends.

    A client whose sending fails may take that for the end of the call, and not see its status.
    """

    async def serve(context: Context) -> None:
        try:
            await answer(context)
        except ServiceError:
            with suppress(TimeoutError):
                async with asyncio.timeout(_HEAR_OUT_S):
                    while await context.read() is not grpc.aio.EOF:
                        pass
            raise

    return serve


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


def _uncounted(answer: Answer) -> Answer:
    """Answer a call of those who watch over the server, and show them why it failed."""

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


class _Calls:
    """What calls have in common: what became of them, told to the caller and counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._responses = metrics.responses

    def counted(self, method: str, answer: Answer) -> Answer:
        """Answer a call, show the caller what became of it, and count that."""

        async def serve(context: Context) -> Any:
            identity, start = _request_id(context), perf_counter()
            metadata = ((request_id.HEADER, identity),)
            context.set_trailing_metadata(metadata)
            code = grpc.StatusCode.OK
            failure: ServiceError | None = None
            try:
                return await answer(context)
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

    def _log(self, method: str, code: grpc.StatusCode, start: float, identity: str) -> None:
        self._responses.labels("grpc", code.name).inc()
        log.info(
            "request",
            method=method,
            status=code.name,
            duration_s=round(perf_counter() - start, 4),
            request_id=identity,
        )


class _TaskCalls:
    """The calls of a task, with one answer or many."""

    def __init__(
        self,
        task: RpcTask[Any, Any],
        catalogue: Catalogue,
        metrics: Metrics,
        budget: ByteBudget,
        *,
        limits: Limits,
        reading: Reading,
    ) -> None:
        self._task = task
        self._catalogue = catalogue
        self._limits = limits
        self._metrics = metrics
        self._budget = budget
        self._reading = reading
        self._streams = 0

    async def one(self, context: Context) -> bytes:
        """Answer the one request of a call."""
        with self._metrics.request(self._task.name, "grpc") as counted:
            self._catalogue.check_room(self._task.core, counted)
            with self._budget.hold(min(_UNREAD_BYTES, self._limits.max_body_bytes)) as held:
                received = wire.Received(await self._reading.read_only(context))
                self._check_size(received, "grpc")
                held.resize(received.size)
                return await self._answer(received, context, counted, lambda response: response)

    async def many(self, context: Context) -> None:
        """Answer the requests of a stream, a bounded number at a time, as they are ready."""
        if self._streams == self._limits.max_streams:
            raise Overloaded(f"{self._streams} streams are open, and no more may be", RETRY_AFTER_S)
        self._streams += 1
        try:
            await self._many(context)
        finally:
            self._streams -= 1

    async def _many(self, context: Context) -> None:
        free = asyncio.Semaphore(_STREAM_CONCURRENCY)
        writing = asyncio.Lock()  # gRPC allows one write at a time
        malformed: list[InvalidRequest] = []

        async def serve(identity: str, received: wire.Received) -> None:
            try:
                answer = await self._stream_answer(identity, received, context)
                async with writing:
                    # Whoever left reads no answer; gRPC then cancels this call.
                    with suppress(grpc.aio.InternalError):
                        await context.write(answer)
            finally:
                free.release()

        async with asyncio.TaskGroup() as tasks:
            await free.acquire()
            while received := await self._receive(context):
                try:
                    asked = received.enter(_REQUEST_IN_STREAM, self._task.stream_request)
                except InvalidRequest as error:  # to whom the answer would belong is not known
                    malformed.append(error.with_traceback(None))
                    break
                tasks.create_task(serve(asked.id, received))
                del received  # the next may be long in coming
                await free.acquire()
        if malformed:
            raise malformed.pop()

    async def _receive(self, context: Context) -> wire.Received | None:
        # Others may always hold some of the budget.
        await self._budget.room(min(self._limits.max_body_bytes, self._budget.limit // 2))
        message = await context.read()
        return None if message is grpc.aio.EOF else wire.Received(message)

    async def _stream_answer(
        self, identity: str, received: wire.Received, context: Context
    ) -> bytes:
        form = partial(self._task.stream_response, id=identity)
        try:
            with self._metrics.request(self._task.name, "stream") as counted:
                self._check_size(received, "stream")
                with self._budget.hold(received.size):
                    return await self._answer(
                        received, context, counted, lambda response: form(response=response)
                    )
        except ServiceError as error:
            failure = error_message(error)
        except Exception:  # a bug in one request must not end the stream of the others
            log.exception("request failed", stream_request=identity)
            failure = error_message(Internal("internal error"))
        return form(error=failure).SerializeToString()

    def _check_size(self, received: wire.Received, protocol: Protocol) -> None:
        self._metrics.body_bytes[protocol].observe(received.size)
        limit = self._limits.max_body_bytes
        if received.size > limit:
            raise ImageTooLarge("too_large", f"the message has more than {limit} bytes")

    async def _answer(
        self,
        received: wire.Received,
        context: Context,
        counted: CountedRequest,
        form: Callable[[Message], Message],
    ) -> bytes:
        """What answers a request, in the form of its call."""
        task = self._task
        take = partial(received.take, _IMAGES, task.request, self._limits.max_images)
        large = received.size > _LARGE_MESSAGE_BYTES
        request, images = await asyncio.to_thread(take) if large else take()
        counted.images = len(images)
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        options = task.options(request, remaining)
        core = self._catalogue.find(task.core, options.model)
        counted.model = core.card.name
        outcomes = await core.answer(images, options)
        counted.outcomes = outcomes

        def render() -> bytes:
            return form(task.response(core.card, outcomes)).SerializeToString()

        # The points of many images are numbers for a tenth of a second.
        return await asyncio.to_thread(render) if options.explain != "none" else render()


def _add_models(
    server: grpc.aio.Server, catalogue: Catalogue, calls: _Calls, reading: Reading
) -> None:
    def describe(core: Core[Any, Any, Any, Any, Any]) -> dat_pb2.Model:
        facts = vars(core.card).copy()
        height, width = facts.pop("image_size") or (None, None)
        facts["resize_mode"] = RESIZE_MODES[core.card.resize_mode]
        default = catalogue.is_default(core)
        return dat_pb2.Model(default=default, width=width, height=height, **facts)

    async def list_models(context: Context) -> bytes:
        wire.parse(dat_pb2.ListModelsRequest, await reading.read_only(context))
        models = map(describe, catalogue.cores)
        return dat_pb2.ListModelsResponse(models=models).SerializeToString()

    async def get_model(context: Context) -> bytes:
        request = wire.parse(dat_pb2.GetModelRequest, await reading.read_only(context))
        core = catalogue.describe(request.name or None)
        labels = (dat_pb2.Label(**vars(label)) for label in core.labels)
        return dat_pb2.GetModelResponse(model=describe(core), labels=labels).SerializeToString()

    methods = {
        "ListModels": _one_answer(calls.counted("ListModels", list_models)),
        "GetModel": _one_answer(calls.counted("GetModel", get_model)),
    }
    server.add_registered_method_handlers("dat.v1.ModelService", methods)


def _add_health(server: grpc.aio.Server, health: Health, reading: Reading) -> None:
    async def request(context: Context) -> health_pb2.HealthCheckRequest:
        return wire.parse(health_pb2.HealthCheckRequest, await reading.read_only(context))

    async def check(context: Context) -> bytes:
        response = await health.Check(await request(context), context)
        return bytes(response.SerializeToString())

    async def watch(context: Context) -> None:
        await health.Watch(await request(context), context)

    methods = {
        "Check": _one_answer(_uncounted(check)),
        "Watch": _many_answers(_uncounted(watch), health_pb2.HealthCheckResponse.SerializeToString),
    }
    server.add_registered_method_handlers(_HEALTH, methods)


def _add_reflection(server: grpc.aio.Server, reading: Reading) -> None:
    servicer = reflection.aio.ReflectionServicer((*SERVICES, _HEALTH, reflection.SERVICE_NAME))

    async def requests(
        context: Context,
    ) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while (message := await reading.read(context)) is not None:
            yield wire.parse(reflection_pb2.ServerReflectionRequest, message)

    async def reflect(context: Context) -> None:
        async for response in servicer.ServerReflectionInfo(requests(context), context):
            await context.write(response)

    serializer = reflection_pb2.ServerReflectionResponse.SerializeToString
    methods = {"ServerReflectionInfo": _many_answers(_uncounted(_heard_out(reflect)), serializer)}
    server.add_registered_method_handlers(reflection.SERVICE_NAME, methods)


def _request_id(context: Context) -> str:
    given = dict(context.invocation_metadata() or ()).get(request_id.HEADER, "")
    # Only keys that end in -bin have values of bytes.
    assert isinstance(given, str)
    return request_id.choose(given)
