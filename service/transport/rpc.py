"""gRPC: messages to `Classifier` and back, nothing else."""

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
from service.classifier import Classification, Classifier, Explain, LayerPoints, Options
from service.errors import DeadlineExceeded, EngineFailed, InvalidOption, ServiceError
from service.metrics import Metrics, Protocol
from service.pb import dat_pb2, dat_pb2_grpc
from service.settings import Limits
from service.transport import request_id

log = structlog.get_logger(__name__)

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = dat_pb2.DESCRIPTOR.services_by_name["ClassifierService"].full_name
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
    """grpc.health.v1 of the whole server and of the classifier, which share their state."""

    async def show(self, serving: bool) -> None:
        """Tell all who ask or watch."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", SERVICE):
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
    dat_pb2_grpc.add_ClassifierServiceServicer_to_server(_Servicer(catalogue, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection(
        (
            SERVICE,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    return server


class _Servicer(dat_pb2_grpc.ClassifierServiceServicer):
    def __init__(self, catalogue: Catalogue, metrics: Metrics) -> None:
        self._catalogue = catalogue
        self._metrics = metrics

    async def Classify(  # noqa: N802
        self, request: dat_pb2.ClassifyRequest, context: Context
    ) -> dat_pb2.ClassifyResponse:
        return await self._unary("Classify", context, self._answer(request, context, "grpc"))

    async def ListModels(  # noqa: N802
        self, _: dat_pb2.ListModelsRequest, context: Context
    ) -> dat_pb2.ListModelsResponse:
        return await self._unary("ListModels", context, self._models())

    async def GetModel(  # noqa: N802
        self, request: dat_pb2.GetModelRequest, context: Context
    ) -> dat_pb2.GetModelResponse:
        return await self._unary("GetModel", context, self._model(request.name or None))

    async def _unary(self, method: str, context: Context, work: Awaitable[T]) -> T:
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

    async def ClassifyStream(  # noqa: N802
        self, requests: AsyncIterator[dat_pb2.ClassifyStreamRequest], context: Context
    ) -> None:
        identity, start = _request_id(context), perf_counter()
        free = asyncio.Semaphore(_STREAM_CONCURRENCY)
        writing = asyncio.Lock()  # gRPC allows one write at a time

        async def serve(message: dat_pb2.ClassifyStreamRequest) -> None:
            try:
                answer = await self._stream_answer(message, context)
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
            self._log("ClassifyStream", code, start, identity)

    async def _stream_answer(
        self, message: dat_pb2.ClassifyStreamRequest, context: Context
    ) -> dat_pb2.ClassifyStreamResponse:
        try:
            response = await self._answer(message.request, context, "stream")
        except ServiceError as error:
            return dat_pb2.ClassifyStreamResponse(id=message.id, error=_error(error))
        except Exception:  # a bug in one request must not end the stream of the others
            log.exception("request failed", stream_request=message.id)
            failure = _error(EngineFailed("internal error"))
            return dat_pb2.ClassifyStreamResponse(id=message.id, error=failure)
        return dat_pb2.ClassifyStreamResponse(id=message.id, response=response)

    async def _answer(
        self, request: dat_pb2.ClassifyRequest, context: Context, protocol: Protocol
    ) -> dat_pb2.ClassifyResponse:
        with self._metrics.request(protocol) as counted:
            self._metrics.body_bytes[protocol].observe(request.ByteSize())
            options = _options(request, context)
            classifier = self._catalogue.find(options.model)
            card = classifier.card
            counted.model = card.name
            outcomes = await classifier.classify(list(request.images), options)
            return dat_pb2.ClassifyResponse(
                model=card.name, version=card.version, results=map(_result, outcomes)
            )

    async def _models(self) -> dat_pb2.ListModelsResponse:
        return dat_pb2.ListModelsResponse(models=map(self._card, self._catalogue.classifiers))

    async def _model(self, name: str | None) -> dat_pb2.GetModelResponse:
        classifier = self._catalogue.find(name)
        labels = (dat_pb2.Label(**vars(label)) for label in classifier.labels)
        return dat_pb2.GetModelResponse(model=self._card(classifier), labels=labels)

    def _card(self, classifier: Classifier) -> dat_pb2.Model:
        facts = vars(classifier.card).copy()
        height, width = facts.pop("image_size")
        default = classifier is self._catalogue.default
        return dat_pb2.Model(default=default, width=width, height=height, **facts)

    def _log(self, method: str, code: grpc.StatusCode, start: float, identity: str) -> None:
        self._metrics.responses.labels("grpc", code.name).inc()
        log.info(
            "request",
            method=method,
            status=code.name,
            duration_s=round(perf_counter() - start, 4),
            request_id=identity,
        )


def _request_id(context: Context) -> str:
    given = dict(context.invocation_metadata() or ()).get(request_id.HEADER, "")
    # Only keys that end in -bin have values of bytes.
    assert isinstance(given, str)
    return request_id.choose(given)


def _options(request: dat_pb2.ClassifyRequest, context: Context) -> Options:
    explain = _EXPLAIN.get(request.explain)
    if explain is None:
        raise InvalidOption(f"explain has no value {request.explain}")
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise DeadlineExceeded("the deadline passed before the request was read")
    top_k = request.top_k if request.HasField("top_k") else Options.top_k
    return Options(request.model or None, top_k, explain, remaining)


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
    timing = outcome.timing
    return dat_pb2.ImageResult(
        classification=dat_pb2.Classification(
            predictions=[dat_pb2.Prediction(**vars(p)) for p in outcome.predictions],
            width=outcome.width,
            height=outcome.height,
            points=None
            if outcome.points is None
            else dat_pb2.Points(layers=map(_layer, outcome.points)),
            timing=dat_pb2.Timing(**vars(timing)),
        )
    )


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
