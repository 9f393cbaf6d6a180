"""The calls of our own interface, version 1: the tasks, pictures and the models.

Messages are read and parsed here and not by gRPC, for which every call sends a stream of bytes;
on the wire there is no difference. So whether a request may come is asked before it is read, what
it holds is counted before it is parsed, and a malformed one has a status of its own.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import Message

from service.byte_budget import ByteBudget
from service.errors import (
    DeadlineExceeded,
    ImageTooLarge,
    Internal,
    ServiceError,
)
from service.metrics.replica import Metrics
from service.metrics.requests import CountedRequest, Protocol
from service.pb import dat_pb2
from service.priority import Priority
from service.security.access import Access
from service.settings.limits import Limits
from service.tasks.catalogue import Catalogue
from service.tasks.core import AnyCore
from service.transport import priority
from service.transport.rpc import wire
from service.transport.rpc.calls import (
    Calls,
    caller_of,
    identity_of,
    metadata_of,
    one_answer,
)
from service.transport.rpc.messages import RESIZE_MODES, error_message, label_message
from service.transport.rpc.reading import Context, Reading
from service.transport.rpc.streams import Streams
from service.transport.rpc.task import RpcCall, RpcTask

MODEL_SERVICE = "dat.v1.ModelService"
_IMAGES = 1  # in the requests of all tasks
_REQUEST_IN_STREAM = 2  # in the messages of all streams
# Of a message that is not being read, gRPC keeps no more than this, bytes; most images fit in it.
UNREAD_BYTES = 256 * 1024
# The images of a larger message are copied where the event loop does not wait for it.
_LARGE_MESSAGE_BYTES = 2**20

log = structlog.get_logger(__name__)


class OneCall:
    """A call with one answer, whose request holds images."""

    def __init__(
        self,
        task: RpcCall,
        catalogue: Catalogue,
        metrics: Metrics,
        budget: ByteBudget,
        *,
        access: Access,
        limits: Limits,
        reading: Reading,
    ) -> None:
        self._task = task
        self._catalogue = catalogue
        self._access = access
        self._limits = limits
        self._metrics = metrics
        self._budget = budget
        self._reading = reading

    async def one(self, context: Context) -> bytes:
        """Answer the one request of a call."""
        with self._metrics.requests.count(self._task.name, "grpc") as counted:
            named = priority.read(metadata_of(context, priority.HEADER))
            self._catalogue.check_room(self._task.name, counted, priority=named)
            least = min(UNREAD_BYTES, self._limits.max_body_bytes)
            with self._budget.hold(least, named) as held:
                received = wire.Received(await self._reading.read_only(context))
                self._check_size(received, "grpc")
                held.resize(received.size)
                return await self._answer(
                    received, context, counted, lambda response: response, named
                )

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
        named: Priority,
    ) -> bytes:
        """What answers a request, in the form of its call, whose metadata name a class."""
        task = self._task
        take = partial(received.take, _IMAGES, task.request, self._limits.max_images)
        large = received.size > _LARGE_MESSAGE_BYTES
        request, images = await asyncio.to_thread(take) if large else take()
        counted.images = len(images)
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        options = task.options(request, remaining)
        options = replace(options, priority=priority.lower(options.priority, named))
        core = self._catalogue.find(task.name, options.model)
        counted.model = core.card.name
        with caller_of(self._access, context).spend(len(images)):
            outcomes = await task.work(core, images, options, identity_of(context))
        counted.outcomes = outcomes

        def render() -> bytes:
            return form(task.answer(core.card, outcomes)).SerializeToString()

        # To write the points of many images takes a tenth of a second.
        return await asyncio.to_thread(render) if options.long_answer else render()


class TaskCalls(OneCall):
    """The calls of a task, with one answer or many."""

    def __init__(
        self,
        task: RpcTask[Any, Any],
        catalogue: Catalogue,
        metrics: Metrics,
        budget: ByteBudget,
        *,
        access: Access,
        limits: Limits,
        reading: Reading,
        streams: Streams,
    ) -> None:
        super().__init__(
            task, catalogue, metrics, budget, access=access, limits=limits, reading=reading
        )
        self._stream = task
        self._streams = streams

    async def many(self, context: Context) -> None:
        """Answer the requests of a stream, a bounded number at a time, as they are ready."""

        def answer(received: wire.Received) -> Callable[[], Awaitable[bytes]]:
            asked = received.enter(_REQUEST_IN_STREAM, self._stream.stream_request)
            return partial(self._stream_answer, asked.id, received, context)

        await self._streams.serve(context, answer)

    async def _stream_answer(
        self, identity: str, received: wire.Received, context: Context
    ) -> bytes:
        form = partial(self._stream.stream_response, id=identity)
        try:
            with self._metrics.requests.count(self._task.name, "stream") as counted:
                self._check_size(received, "stream")
                named = priority.read(metadata_of(context, priority.HEADER))
                with self._budget.hold(received.size, named):
                    return await self._answer(
                        received, context, counted, lambda response: form(response=response), named
                    )
        except ServiceError as error:
            failure = error_message(error)
        except Exception:  # a bug in one request must not end the stream of the others
            log.exception("request failed", stream_request=identity)
            failure = error_message(Internal("internal error"))
        return form(error=failure).SerializeToString()


def add_models(
    server: grpc.aio.Server, catalogue: Catalogue, calls: Calls, reading: Reading
) -> None:
    """Serve the list of models, and what is known of each."""

    def describe(core: AnyCore) -> dat_pb2.Model:
        facts = vars(core.card).copy()
        height, width = facts.pop("image_size") or (None, None)
        del facts["buckets"]  # the Open Inference Protocol has them in its model config
        facts["resize_mode"] = RESIZE_MODES[core.card.resize_mode]
        default = catalogue.is_default(core)
        facts["explained_layers"] = [
            dat_pb2.LayerName(stage=stage, block=block) for stage, block in core.explained_layers
        ]
        return dat_pb2.Model(default=default, width=width, height=height, **facts)

    async def list_models(context: Context) -> bytes:
        wire.parse(dat_pb2.ListModelsRequest, await reading.read_only(context))
        models = map(describe, catalogue.cores)
        return dat_pb2.ListModelsResponse(models=models).SerializeToString()

    async def get_model(context: Context) -> bytes:
        request = wire.parse(dat_pb2.GetModelRequest, await reading.read_only(context))
        core = catalogue.describe(request.name or None)
        labels = map(label_message, core.labels)
        return dat_pb2.GetModelResponse(model=describe(core), labels=labels).SerializeToString()

    methods = {
        "ListModels": one_answer(calls.counted("ListModels", list_models)),
        "GetModel": one_answer(calls.counted("GetModel", get_model)),
    }
    server.add_registered_method_handlers(MODEL_SERVICE, methods)
