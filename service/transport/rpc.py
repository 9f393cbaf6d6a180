"""gRPC: messages to the cores and back, nothing else."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any, Generic, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from service.catalogue import Catalogue
from service.classifier import Classification, Classifier, ClassifyOptions
from service.core import Answer, Core, Explain, Options, Timing
from service.errors import DeadlineExceeded, EngineFailed, InvalidOption, ServiceError
from service.metrics import Metrics, Protocol, Task
from service.pb import dat_pb2, dat_pb2_grpc
from service.points import LayerPoints
from service.served_model import ModelCard
from service.settings import Limits
from service.transport import request_id

log = structlog.get_logger(__name__)

T = TypeVar("T")
TaskOptions = TypeVar("TaskOptions", bound=Options)
TaskAnswer = TypeVar("TaskAnswer", bound=Answer)
Context = grpc.aio.ServicerContext[Any, Any]

SERVICES = [service.full_name for service in dat_pb2.DESCRIPTOR.services_by_name.values()]
_EXPLAIN: dict[int, Explain] = {
    dat_pb2.EXPLAIN_UNSPECIFIED: "none",
    dat_pb2.EXPLAIN_NONE: "none",
    dat_pb2.EXPLAIN_POINTS: "points",
}
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


@dataclass(frozen=True)
class _Task(Generic[TaskOptions, TaskAnswer]):
    """How a task looks over gRPC.

    Attributes:
        name: of the task.
        core: what answers.
        options: of the core from a request and the seconds that are left for it.
        response: from what the core says.
        streamed: the message of a stream.
    """

    name: Task
    core: type[Core[TaskOptions, Any, Any, Any, TaskAnswer]]
    options: Callable[[Any, float | None], TaskOptions]
    response: Callable[[ModelCard, Sequence[TaskAnswer | ServiceError]], Any]
    streamed: Callable[..., Any]


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
        self, method: str, context: Context, requests: AsyncIterator[Any], task: _Task[Any, Any]
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

    async def _stream_answer(self, message: Any, context: Context, task: _Task[Any, Any]) -> Any:
        try:
            response = await self.answer(message.request, context, "stream", task)
        except ServiceError as error:
            return task.streamed(id=message.id, error=_error(error))
        except Exception:  # a bug in one request must not end the stream of the others
            log.exception("request failed", stream_request=message.id)
            failure = _error(EngineFailed("internal error"))
            return task.streamed(id=message.id, error=failure)
        return task.streamed(id=message.id, response=response)

    async def answer(
        self, request: Any, context: Context, protocol: Protocol, task: _Task[Any, Any]
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
            options = task.options(request, remaining)
            core = self.catalogue.find(task.core, options.model)
            counted.model = core.card.name
            return task.response(core.card, await core.answer(list(request.images), options))

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
        answer = self._calls.answer(request, context, "grpc", _CLASSIFY)
        return await self._calls.unary("Classify", context, answer)

    async def ClassifyStream(  # noqa: N802
        self, requests: AsyncIterator[dat_pb2.ClassifyStreamRequest], context: Context
    ) -> None:
        await self._calls.stream("ClassifyStream", context, requests, _CLASSIFY)


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
        height, width = facts.pop("image_size")
        default = self._calls.catalogue.is_default(core)
        return dat_pb2.Model(default=default, width=width, height=height, **facts)


def _classify_options(
    request: dat_pb2.ClassifyRequest, remaining_s: float | None
) -> ClassifyOptions:
    return ClassifyOptions(
        model=request.model or None,
        explain=_explain(request.explain),
        timeout_s=remaining_s,
        top_k=request.top_k if request.HasField("top_k") else ClassifyOptions.top_k,
    )


def _explain(value: int) -> Explain:
    explain = _EXPLAIN.get(value)
    if explain is None:
        raise InvalidOption(f"explain has no value {value}")
    return explain


def _classify_response(
    card: ModelCard, outcomes: Sequence[Classification | ServiceError]
) -> dat_pb2.ClassifyResponse:
    return dat_pb2.ClassifyResponse(
        model=card.name, version=card.version, results=map(_result, outcomes)
    )


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


def _error(error: ServiceError) -> dat_pb2.Error:
    return dat_pb2.Error(code=error.code, message=str(error), grpc_code=error.grpc_code.value[0])


def _result(outcome: Classification | ServiceError) -> dat_pb2.ImageResult:
    if isinstance(outcome, ServiceError):
        return dat_pb2.ImageResult(error=_error(outcome))
    return dat_pb2.ImageResult(
        classification=dat_pb2.Classification(
            predictions=[dat_pb2.Prediction(**vars(p)) for p in outcome.predictions],
            width=outcome.width,
            height=outcome.height,
            points=_points(outcome.points),
            timing=_timing(outcome.timing),
        )
    )


def _timing(timing: Timing) -> dat_pb2.Timing:
    return dat_pb2.Timing(**vars(timing))


def _points(layers: Sequence[LayerPoints] | None) -> dat_pb2.Points | None:
    return None if layers is None else dat_pb2.Points(layers=map(_layer, layers))


def _layer(layer: LayerPoints) -> dat_pb2.DeformableLayer:
    groups, rows, columns, _ = layer.sampling_locations.shape
    return dat_pb2.DeformableLayer(
        stage=layer.stage,
        block=layer.block,
        groups=groups,
        rows=rows,
        columns=columns,
        sampling_locations=layer.sampling_locations.ravel().tolist(),
        reference_points=layer.reference_points.ravel().tolist(),
    )


_CLASSIFY = _Task(
    "classify",
    Classifier,
    _classify_options,
    _classify_response,
    dat_pb2.ClassifyStreamResponse,
)
