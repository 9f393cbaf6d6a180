"""gRPC: messages to the cores and back, nothing else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from math import ceil
from time import perf_counter
from typing import Any, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from service.catalogue import Catalogue
from service.core import Core
from service.errors import DeadlineExceeded, Internal, ServiceError
from service.metrics import Metrics, Protocol
from service.pb import dat_pb2, dat_pb2_grpc
from service.settings import Limits
from service.transport import request_id
from service.transport.messages import CLASSIFY, DETECT, RESIZE_MODES, RpcTask, error_message

log = structlog.get_logger(__name__)

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

SERVICES = [service.full_name for service in dat_pb2.DESCRIPTOR.services_by_name.values()]
# Beside the images, a message holds options and framing.
_MESSAGE_OVERHEAD_BYTES = 64 * 1024
# Requests of one stream that are worked on at a time; more wait in the flow control of HTTP/2.
_STREAM_CONCURRENCY = 64


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
    catalogue: Catalogue, health: Health, limits: Limits, metrics: Metrics
) -> grpc.aio.Server:
    """The gRPC interface over the cores, with health and reflection."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limits.max_body_bytes + _MESSAGE_OVERHEAD_BYTES),
            # Points of many images outgrow the default of 4 MiB.
            ("grpc.max_send_message_length", -1),
            # Two servers on one port would share its connections silently.
            ("grpc.so_reuseport", 0),
        ]
    )
    calls = _Calls(catalogue, metrics)
    dat_pb2_grpc.add_ClassifierServiceServicer_to_server(_ClassifierServicer(calls), server)
    dat_pb2_grpc.add_DetectorServiceServicer_to_server(_DetectorServicer(calls), server)
    dat_pb2_grpc.add_ModelServiceServicer_to_server(_ModelServicer(calls), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (
            *SERVICES,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    return server


class _Calls:
    """What all calls have in common: what became of them, told to the caller and counted."""

    def __init__(self, catalogue: Catalogue, metrics: Metrics) -> None:
        self.catalogue = catalogue
        self._metrics = metrics

    async def unary(self, method: str, context: Context, work: Awaitable[T]) -> T:
        """Await the answer of a call, and show the caller what became of it."""
        identity, start = _request_id(context), perf_counter()
        context.set_trailing_metadata(((request_id.HEADER, identity),))
        code = grpc.StatusCode.OK
        try:
            return await work
        except ServiceError as error:
            code = error.grpc_code
            await context.abort(code, str(error), _error_metadata(error, identity))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:  # gRPC would show the caller the text of a bug
            code = grpc.StatusCode.INTERNAL
            log.exception("request failed", request_id=identity)
            await context.abort(code, "internal error", ((request_id.HEADER, identity),))
        finally:
            self._log(method, code, start, identity)
        raise AssertionError("abort returned: this is a bug")

    async def stream(
        self, method: str, context: Context, requests: AsyncIterator[Any], task: RpcTask[Any, Any]
    ) -> None:
        """Answer the requests of a stream, a bounded number at a time, as they are ready."""
        identity, start = _request_id(context), perf_counter()
        free = asyncio.Semaphore(_STREAM_CONCURRENCY)
        writing = asyncio.Lock()  # gRPC allows one write at a time

        async def serve(message: Any) -> None:
            try:
                answer = await self._stream_answer(message, context, task)
                async with writing:
                    await context.write(answer)
            finally:
                free.release()

        code = grpc.StatusCode.CANCELLED
        try:
            async with asyncio.TaskGroup() as tasks:
                async for message in requests:
                    await free.acquire()
                    tasks.create_task(serve(message))
            code = grpc.StatusCode.OK
        finally:
            self._log(method, code, start, identity)

    async def _stream_answer(self, message: Any, context: Context, task: RpcTask[Any, Any]) -> Any:
        try:
            response = await self.answer(message.request, context, "stream", task)
        except ServiceError as error:
            return task.streamed(id=message.id, error=error_message(error))
        except Exception:  # a bug in one request must not end the stream of the others
            log.exception("request failed", stream_request=message.id)
            failure = error_message(Internal("internal error"))
            return task.streamed(id=message.id, error=failure)
        return task.streamed(id=message.id, response=response)

    async def answer(
        self, request: Any, context: Context, protocol: Protocol, task: RpcTask[Any, Any]
    ) -> Any:
        """The response to the request of a task.

        Raises:
            ServiceError: the request as a whole cannot be answered.
        """
        with self._metrics.request(task.name, protocol) as counted:
            self._metrics.body_bytes[protocol].observe(request.ByteSize())
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                raise DeadlineExceeded("the deadline passed before the request was read")
            counted.images = len(request.images)
            options = task.options(request, remaining)
            core = self.catalogue.find(task.core, options.model)
            counted.model = core.card.name
            outcomes = await core.answer(list(request.images), options)
            counted.outcomes = outcomes
            return task.response(core.card, outcomes)

    def _log(self, method: str, code: grpc.StatusCode, start: float, identity: str) -> None:
        self._metrics.responses.labels("grpc", code.name).inc()
        log.info(
            "request",
            method=method,
            status=code.name,
            duration_s=round(perf_counter() - start, 4),
            request_id=identity,
        )


class _ClassifierServicer(dat_pb2_grpc.ClassifierServiceServicer):
    def __init__(self, calls: _Calls) -> None:
        self._calls = calls

    async def Classify(  # noqa: N802
        self, request: dat_pb2.ClassifyRequest, context: Context
    ) -> dat_pb2.ClassifyResponse:
        answer = self._calls.answer(request, context, "grpc", CLASSIFY)
        return await self._calls.unary("Classify", context, answer)

    async def ClassifyStream(  # noqa: N802
        self, requests: AsyncIterator[dat_pb2.ClassifyStreamRequest], context: Context
    ) -> None:
        await self._calls.stream("ClassifyStream", context, requests, CLASSIFY)


class _DetectorServicer(dat_pb2_grpc.DetectorServiceServicer):
    def __init__(self, calls: _Calls) -> None:
        self._calls = calls

    async def Detect(  # noqa: N802
        self, request: dat_pb2.DetectRequest, context: Context
    ) -> dat_pb2.DetectResponse:
        answer = self._calls.answer(request, context, "grpc", DETECT)
        return await self._calls.unary("Detect", context, answer)

    async def DetectStream(  # noqa: N802
        self, requests: AsyncIterator[dat_pb2.DetectStreamRequest], context: Context
    ) -> None:
        await self._calls.stream("DetectStream", context, requests, DETECT)


class _ModelServicer(dat_pb2_grpc.ModelServiceServicer):
    def __init__(self, calls: _Calls) -> None:
        self._calls = calls

    async def ListModels(  # noqa: N802
        self, _: dat_pb2.ListModelsRequest, context: Context
    ) -> dat_pb2.ListModelsResponse:
        return await self._calls.unary("ListModels", context, self._list())

    async def GetModel(  # noqa: N802
        self, request: dat_pb2.GetModelRequest, context: Context
    ) -> dat_pb2.GetModelResponse:
        return await self._calls.unary("GetModel", context, self._get(request.name or None))

    async def _list(self) -> dat_pb2.ListModelsResponse:
        return dat_pb2.ListModelsResponse(models=map(self._model, self._calls.catalogue.cores))

    async def _get(self, name: str | None) -> dat_pb2.GetModelResponse:
        core = self._calls.catalogue.describe(name)
        labels = (dat_pb2.Label(**vars(label)) for label in core.labels)
        return dat_pb2.GetModelResponse(model=self._model(core), labels=labels)

    def _model(self, core: Core[Any, Any, Any, Any, Any]) -> dat_pb2.Model:
        facts = vars(core.card).copy()
        height, width = facts.pop("image_size") or (None, None)
        facts["resize_mode"] = RESIZE_MODES[core.card.resize_mode]
        default = self._calls.catalogue.is_default(core)
        return dat_pb2.Model(default=default, width=width, height=height, **facts)


def _request_id(context: Context) -> str:
    given = dict(context.invocation_metadata() or ()).get(request_id.HEADER, "")
    # Only keys that end in -bin have values of bytes.
    assert isinstance(given, str)
    return request_id.choose(given)


def _error_metadata(error: ServiceError, identity: str) -> tuple[tuple[str, str], ...]:
    metadata = [(request_id.HEADER, identity), ("dat-error-code", error.code)]
    if error.retry_after_s is not None:
        # What gRPC's own retry policies obey (proposal A6).
        metadata.append(("grpc-retry-pushback-ms", str(max(1, ceil(error.retry_after_s * 1e3)))))
    return tuple(metadata)
