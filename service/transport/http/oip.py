"""The routes of the Open Inference Protocol, under `/v2`."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from service.byte_budget import ByteBudget, HeldBytes
from service.errors import Cancelled, DeadlineExceeded
from service.metrics.replica import Metrics
from service.priority import Priority
from service.settings.limits import Limits
from service.tasks.core import AnyCore, Options
from service.transport import priority
from service.transport.http import content_coding
from service.transport.http.context import request_id
from service.transport.http.endpoints import Endpoint
from service.transport.http.exchange import server_timing, unless_disconnected
from service.transport.http.oip_body import (
    HEADER_LENGTH,
    MANY_NUMBERS,
    VALUE_BYTES,
    WARNING,
    ReadBody,
    count_values,
    read_body,
    read_header_length,
    write_body,
)
from service.transport.http.oip_document import (
    HEALTH,
    INFER,
    METADATA,
    METADATA_OF_SERVER,
    MODEL,
    MODEL_READY,
    VERSION,
    names_of,
)
from service.transport.http.uploads import PARSED_AT_ONCE_BYTES, receive, too_large
from service.transport.oip.inference import (
    NAME,
    Inference,
    InferRequest,
    Understood,
)
from service.transport.oip.parameters import Parameters
from service.transport.oip.task import TensorFacts
from service.transport.oip.tensors import Tensor


def add_open_inference(app: FastAPI, inference: Inference, *, version: str) -> None:
    """Serve the protocol but for `infer`: health and metadata.

    Args:
        app: has them from now on.
        inference: the models as the protocol sees them.
        version: of the server.
    """

    async def live() -> JSONResponse:
        """Fails when only a restart can help."""
        return JSONResponse({"live": inference.live}, 200 if inference.live else 503)

    async def ready() -> JSONResponse:
        """Holds while all models answer."""
        is_ready = inference.ready
        return JSONResponse({"live": inference.live, "ready": is_ready}, 200 if is_ready else 503)

    async def server() -> JSONResponse:
        """The extensions are those of the protocol that this server has."""
        return JSONResponse({"name": NAME, "version": version, "extensions": inference.extensions})

    async def model_ready(request: Request) -> JSONResponse:
        """Holds while the model answers."""
        name, asked = names_of(request)
        is_ready = inference.is_ready(name, asked)
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    async def model(request: Request) -> JSONResponse:
        """A request has one of the inputs, and the first dimension is the batch."""
        metadata = inference.metadata(inference.find(*names_of(request)))
        return JSONResponse(
            {
                "name": metadata.name,
                "versions": list(metadata.versions),
                "platform": metadata.platform,
                "inputs": _tensors(metadata.inputs),
                "outputs": _tensors(metadata.outputs),
                "properties": metadata.properties,
            }
        )

    app.add_api_route("/v2/health/live", live, summary="Whether the process lives", **HEALTH)
    app.add_api_route("/v2/health/ready", ready, summary="Whether all models answer", **HEALTH)
    app.add_api_route("/v2", server, summary="What this server is", **METADATA_OF_SERVER)
    for path, document in ((MODEL, True), (VERSION, False)):
        app.add_api_route(
            f"{path}/ready",
            model_ready,
            include_in_schema=document,
            summary="Whether a model answers",
            **MODEL_READY,
        )
        app.add_api_route(
            path, model, include_in_schema=document, summary="The tensors of a model", **METADATA
        )


def _tensors(facts: Sequence[TensorFacts]) -> list[Mapping[str, Any]]:
    return [{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in facts]


class InferRequests:
    """The way of every request with tensors."""

    def __init__(
        self, inference: Inference, limits: Limits, metrics: Metrics, budget: ByteBudget
    ) -> None:
        self._inference = inference
        self._limits = limits
        self._metrics = metrics
        self._budget = budget

    async def answer(self, request: Request) -> Response:
        """Takes JSON with the tensors inside, or with the binary tensor data extension behind it.

        If one of several images fails, the request fails with its failure. With
        `Inference-Header-Content-Length: 0` the body is one JPEG, PNG or WebP image.
        """
        began = asyncio.get_running_loop().time()
        inference, names = self._inference, names_of(request)
        task = inference.find(*names).card.task
        with self._metrics.requests.count(task, "http") as counted:
            named = priority.read(request.headers.get(priority.HEADER))
            coding = content_coding.choose(request.headers.getlist("content-encoding"))
            header_length = read_header_length(request.headers.get(HEADER_LENGTH))
            length = int(request.headers.get("content-length", 0))
            if length > self._limits.max_body_bytes:
                raise too_large(self._limits.max_body_bytes)
            only = inference.find(*names)
            inference.catalogue.check_room(task, counted, only=only, priority=named)
            del only  # another version may serve when the body is there
            with self._budget.hold(length, named) as held:
                body = await self._receive(request, coding, held, began)
                self._metrics.body_bytes["http"].observe(len(body))
                core = inference.find(*names)
                counted.model = core.card.name
                owner = request.state.caller.name
                read, understood = await self._read(body, header_length, held, core, named, owner)
                counted.images = len(understood.uploads)
                del body
                options = self._timed(understood.options, began)
                with request.state.caller.spend(len(understood.uploads)):
                    working = core.answer(understood.uploads, options, request_id(request))
                    outcomes = await unless_disconnected(request, working)
            understood = replace(understood, uploads=())
            tensors = inference.answer(core, understood, outcomes)
            large = sum(tensor.values.size for tensor in tensors) > MANY_NUMBERS
            respond = partial(
                _respond, read, core, tensors, server_timing(outcomes), request_id(request)
            )
            return await asyncio.to_thread(respond) if large else respond()

    async def _receive(
        self, request: Request, coding: str, held: HeldBytes, began: float
    ) -> bytearray:
        limits = self._limits
        try:
            async with asyncio.timeout_at(began + limits.default_timeout_s):
                return await receive(request, coding, limits.max_body_bytes, held)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the request was received") from None
        except ClientDisconnect:
            raise Cancelled("the client left before the end of its request") from None

    async def _read(  # noqa: PLR0917
        self,
        body: bytearray,
        header_length: int | None,
        held: HeldBytes,
        core: AnyCore,
        named: Priority,
        owner: str,
    ) -> tuple[ReadBody, Understood]:
        values = count_values(body, header_length)
        extra = min(values * VALUE_BYTES, held.free)
        held.grow(extra)

        def work() -> tuple[ReadBody, Understood]:
            read = read_body(body, header_length)
            return read, self._inference.understand(core, read.request, named, owner)

        large = len(body) > PARSED_AT_ONCE_BYTES
        read, understood = await asyncio.to_thread(work) if large else work()
        held.give_back(extra)
        held.grow(understood.copied)
        # Its inputs hold the body, and what was read of it.
        return replace(read, request=replace(read.request, inputs=())), understood

    def _timed(self, options: Options, began: float) -> Options:
        """Options with the time that is left for the answer."""
        timeout_s = options.timeout_s
        if timeout_s is None:
            timeout_s = self._limits.default_timeout_s
        left_s = began + timeout_s - asyncio.get_running_loop().time()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline passed before the request was received")
        return replace(options, timeout_s=left_s)


def _respond(
    read: ReadBody,
    core: AnyCore,
    tensors: Sequence[Tensor],
    headers: Mapping[str, str],
    identity: str,
) -> Response:
    request, card = read.request, core.card
    head = {
        "model_name": card.name,
        "model_version": card.version,
        "id": request.id or identity,
    }
    written = write_body(head, tensors, _are_binary(request, tensors))
    headers = dict(headers)
    if read.has_many_numbers or written.has_many_numbers:
        headers["Warning"] = WARNING
    if written.header_length is None:
        return Response(written.content, media_type="application/json", headers=headers)
    headers[HEADER_LENGTH.title()] = str(written.header_length)
    return Response(written.content, media_type="application/octet-stream", headers=headers)


def _are_binary(request: InferRequest, tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each output lies behind the JSON: as it says itself, or else the request."""
    every = Parameters(request.parameters).flag("binary_data_output")
    single = {one.name: Parameters(one.parameters).flag("binary_data") for one in request.outputs}
    asked = [single.get(tensor.name) for tensor in tensors]
    return [bool(every) if one is None else one for one in asked]


def add_infer(app: FastAPI, requests: InferRequests) -> Endpoint:
    """Document `infer`, which is answered past FastAPI.

    Returns:
        What answers its requests.
    """
    for path, document in ((MODEL, True), (VERSION, False)):
        app.add_api_route(
            f"{path}/infer",
            requests.answer,
            methods=["POST"],
            include_in_schema=document,
            summary="Answer for the images of one request",
            **INFER,
        )
    return requests.answer
