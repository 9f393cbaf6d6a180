"""The calls of the Open Inference Protocol."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message

from service.byte_budget import ByteBudget, HeldBytes
from service.errors import DeadlineExceeded, ImageTooLarge, Internal, ServiceError
from service.metrics.replica import Metrics
from service.metrics.requests import Protocol
from service.pb import inference_pb2
from service.priority import Priority
from service.security.access import Access
from service.settings.limits import Limits
from service.tasks.core import AnyCore, Options
from service.transport import priority
from service.transport.oip.inference import NAME, Inference, Understood
from service.transport.rpc import wire
from service.transport.rpc.calls import (
    Answer,
    Calls,
    caller_of,
    identity_of,
    many_answers,
    metadata_of,
    one_answer,
    uncounted,
)
from service.transport.rpc.oip_messages import (
    NESTED,
    RAW_INPUTS,
    metadata_message,
    read_request,
    write_response,
)
from service.transport.rpc.reading import Context, Reading
from service.transport.rpc.streams import Streams
from service.transport.rpc.v1 import UNREAD_BYTES

OPEN_INFERENCE_SERVICE = "inference.GRPCInferenceService"
# A larger message is read, and its tensors are made, where the event loop does not wait for it.
_LARGE_MESSAGE_BYTES = 2**20
_LARGE_ANSWER = 10_000  # values
# Elements of a message take up to so many times their bytes in memory.
_PARSED = 4

log = structlog.get_logger(__name__)


def add_open_inference(
    server: grpc.aio.Server,
    inference: Inference,
    calls: Calls,
    requests: "InferCalls",
    *,
    reading: Reading,
    version: str,
    beside: Mapping[str, Answer],
) -> None:
    """Serve the protocol.

    Args:
        server: has it from now on.
        inference: the models as the protocol sees them.
        calls: what all calls have in common.
        requests: answers those with tensors.
        reading: of messages without tensors.
        version: of the server.
        beside: other calls of the protocol, by name.
    """
    small = partial(without_tensors, reading)

    def metadata(request: inference_pb2.ModelMetadataRequest) -> Message:
        return metadata_message(inference.metadata(inference.find(request.name, request.version)))

    def model_ready(request: inference_pb2.ModelReadyRequest) -> Message:
        ready = inference.is_ready(request.name, request.version)
        return inference_pb2.ModelReadyResponse(ready=ready)

    def server_metadata(_: Message) -> Message:
        return inference_pb2.ServerMetadataResponse(
            name=NAME, version=version, extensions=inference.extensions
        )

    probes = {
        "ServerLive": small(
            inference_pb2.ServerLiveRequest,
            lambda _: inference_pb2.ServerLiveResponse(live=inference.live),
        ),
        "ServerReady": small(
            inference_pb2.ServerReadyRequest,
            lambda _: inference_pb2.ServerReadyResponse(ready=inference.ready),
        ),
    }
    asked = {
        "ServerMetadata": small(inference_pb2.ServerMetadataRequest, server_metadata),
        "ModelReady": small(inference_pb2.ModelReadyRequest, model_ready),
        "ModelMetadata": small(inference_pb2.ModelMetadataRequest, metadata),
        "ModelInfer": requests.one,
        **beside,
    }
    stream = "ModelStreamInfer"
    methods = {
        **{name: one_answer(uncounted(answer)) for name, answer in probes.items()},
        **{name: one_answer(calls.counted(name, answer)) for name, answer in asked.items()},
        stream: many_answers(calls.counted(stream, requests.many, stream=True)),
    }
    server.add_registered_method_handlers(OPEN_INFERENCE_SERVICE, methods)


def without_tensors(reading: Reading, kind: type[Any], work: Callable[[Any], Message]) -> Answer:
    """A call without tensors.

    Args:
        reading: of its message.
        kind: of that message.
        work: makes the answer of it.
    """

    async def answer(context: Context) -> bytes:
        request = wire.parse(kind, await reading.read_only(context))
        return work(request).SerializeToString()

    return answer


class InferCalls:
    """The calls whose requests hold tensors."""

    def __init__(
        self,
        inference: Inference,
        metrics: Metrics,
        budget: ByteBudget,
        *,
        access: Access,
        limits: Limits,
        reading: Reading,
        streams: Streams,
    ) -> None:
        self._inference = inference
        self._metrics = metrics
        self._budget = budget
        self._access = access
        self._limits = limits
        self._reading = reading
        self._streams = streams

    async def one(self, context: Context) -> bytes:
        """Answer the one request of a call."""
        # Which model is asked is known when the message is there: until then any may have room.
        named = priority.read(metadata_of(context, priority.HEADER))
        self._check_room(named)
        with self._budget.hold(min(UNREAD_BYTES, self._limits.max_body_bytes), named) as held:
            received = wire.Received(await self._reading.read_only(context))
            response = await self._answer(received, context, held, "grpc", named)
            return response.SerializeToString()

    async def many(self, context: Context) -> None:
        """Answer the requests of a stream, a bounded number at a time, as they are ready."""

        def answer(received: wire.Received) -> Callable[[], Awaitable[bytes]]:
            return partial(self._stream_answer, received, context)

        await self._streams.serve(context, answer)

    def _check_room(self, named: Priority) -> None:
        """Refuse a call of which nothing was read, if no model has room for it."""
        catalogue = self._inference.catalogue
        tasks = list(dict.fromkeys(core.card.task for core in self._inference.cores))
        if any(catalogue.refusal(task, priority=named) is None for task in tasks):
            return
        if tasks:
            with self._metrics.requests.count(tasks[0], "grpc") as counted:
                catalogue.check_room(tasks[0], counted, priority=named)

    async def _answer(  # noqa: PLR0917
        self,
        received: wire.Received,
        context: Context,
        held: HeldBytes,
        protocol: Protocol,
        named: Priority,
        note: Callable[[str], None] = lambda _: None,
    ) -> inference_pb2.ModelInferResponse:
        """The message that answers a request; its id is noted as soon as it is known."""
        size, limit = received.size, self._limits.max_body_bytes
        self._metrics.body_bytes[protocol].observe(size)
        if size > limit:
            raise ImageTooLarge("too_large", f"the message has more than {limit} bytes")
        held.resize(size)
        large = size > _LARGE_MESSAGE_BYTES
        take = partial(received.take_tensors, RAW_INPUTS, NESTED, inference_pb2.ModelInferRequest)
        message, raw = await asyncio.to_thread(take) if large else take()
        note(message.id)
        inference = self._inference
        core = inference.find(message.model_name, message.model_version)
        with self._metrics.requests.count(core.card.task, protocol) as counted:
            counted.model = core.card.name
            extra = min(_PARSED * (size - sum(map(len, raw))), held.free)
            held.grow(extra)
            identity = message.id or identity_of(context)
            owner = caller_of(self._access, context).name
            read = partial(self._read, core, message, raw, named, owner)
            understood = await asyncio.to_thread(read) if large else read()
            held.give_back(extra)
            held.grow(understood.copied)
            del read, message, raw
            uploads = understood.uploads
            counted.images = len(uploads)
            options = self._timed(understood.options, context)
            understood = replace(understood, uploads=())
            with caller_of(self._access, context).spend(len(uploads)):
                outcomes = await core.answer(uploads, options, identity_of(context))
            tensors = inference.answer(core, understood, outcomes)
            card = core.card
            write = partial(write_response, card.name, card.version, identity, tensors)
            many = sum(tensor.values.size for tensor in tensors) > _LARGE_ANSWER
            return await asyncio.to_thread(write) if many else write()

    def _read(
        self,
        core: AnyCore,
        message: inference_pb2.ModelInferRequest,
        raw: Sequence[memoryview],
        named: Priority,
        owner: str,
    ) -> Understood:
        return self._inference.understand(core, read_request(message, raw), named, owner)

    def _timed(self, options: Options, context: Context) -> Options:
        """Options with the time that is left: by the deadline of the call, or by its parameter."""
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        given = [one for one in (remaining, options.timeout_s) if one is not None]
        return replace(options, timeout_s=min(given, default=None))

    async def _stream_answer(self, received: wire.Received, context: Context) -> bytes:
        kind = inference_pb2.ModelStreamInferResponse
        known: list[str] = []
        try:
            named = priority.read(metadata_of(context, priority.HEADER))
            with self._budget.hold(0, named) as held:
                response = await self._answer(
                    received, context, held, "stream", named, known.append
                )
                return kind(infer_response=response).SerializeToString()
        except ServiceError as error:
            failure = str(error)
        except Exception:  # a bug in one request must not end the stream of the others
            log.exception("request failed", stream_request=known)
            failure = str(Internal("internal error"))
        # So its caller knows which request failed.
        response = inference_pb2.ModelInferResponse(id="".join(known))
        return kind(error_message=failure, infer_response=response).SerializeToString()
