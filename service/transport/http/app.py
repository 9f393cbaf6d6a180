"""HTTP: bytes to the cores and back, nothing else."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from time import perf_counter
from typing import Any, Generic, TypeVar

import structlog
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.byte_budget import ByteBudget
from service.errors import Cancelled, ServiceError, UnsupportedCoding, quoted
from service.lifecycle import Lifecycle
from service.metrics import Metrics, Task
from service.models.load import ModelCard
from service.settings import Limits
from service.tasks.catalogue import Catalogue
from service.tasks.classification import Classifier
from service.tasks.core import Answer, Core, Options
from service.tasks.detection import DetectorCore
from service.transport import request_id as request_ids
from service.transport.http import content_coding
from service.transport.http.classification_schema import (
    ClassifyAnswer,
    ClassifyJson,
    ClassifyOptionsBody,
)
from service.transport.http.connections import SECURITY_HEADERS
from service.transport.http.detection_schema import DetectAnswer, DetectJson, DetectOptionsBody
from service.transport.http.schema import (
    ErrorAnswer,
    ErrorBody,
    HealthAnswer,
    LabelledModelBody,
    ModelBody,
    ModelsAnswer,
    error_body,
)
from service.transport.http.uploads import RAW_TYPES, Form, read_body, read_head

T = TypeVar("T")
TaskOptions = TypeVar("TaskOptions", bound=Options)
TaskAnswer = TypeVar("TaskAnswer", bound=Answer)

log = structlog.get_logger(__name__)


def create_app(
    catalogue: Catalogue,
    lifecycle: Lifecycle,
    limits: Limits,
    metrics: Metrics,
    *,
    budget: ByteBudget,
    version: str,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """The HTTP interface over the cores.

    Args:
        catalogue: the models.
        lifecycle: what the probes show.
        limits: of a request.
        metrics: where requests are counted.
        budget: of the bytes of requests in flight.
        version: of the server.
        origins: of the pages whose scripts may use it; `*` is all.
    """
    app = FastAPI(
        title="DAT Serve",
        version=version,
        description="Runs DAT vision models on images, and says where they looked.",
        # Their pages load scripts from another host; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to whatever Host the request names
    )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    _add_task(app, _CLASSIFY, catalogue, limits, metrics, budget=budget)
    _add_task(app, _DETECT, catalogue, limits, metrics, budget=budget)

    @app.get(
        "/v1/models",
        response_model_exclude_none=True,
        responses=_OK | _only(500),
        tags=["models"],
        summary="The models that are served",
    )
    async def models() -> ModelsAnswer:
        """What each of them is, and what an image costs it."""
        return ModelsAnswer(models=[ModelBody.of(core, catalogue) for core in catalogue.cores])

    @app.get(
        "/v1/models/{name}",
        response_model_exclude_none=True,
        responses=_OK | _only(404, 500),
        openapi_extra={"parameters": [_NAME]},
        tags=["models"],
        summary="One model, with the names of its classes",
    )
    async def model(request: Request) -> LabelledModelBody:
        """The names are in order of the class index."""
        # Not an argument: FastAPI would document a 422 that never comes.
        return LabelledModelBody.of(catalogue.describe(request.path_params["name"]), catalogue)

    @app.get("/health/live", **_HEALTH, summary="Whether the process should go on")
    async def live() -> JSONResponse:
        """Fails when only a restart can help."""
        return _health(lifecycle.live)

    @app.get("/health/ready", **_HEALTH, summary="Whether to send requests here")
    async def ready() -> JSONResponse:
        """Holds from the end of warm-up to the signal to leave."""
        return _health(lifecycle.ready)

    @app.get("/health/startup", **_HEALTH, summary="Whether start-up is over")
    async def startup() -> JSONResponse:
        """Holds from the end of warm-up on."""
        return _health(lifecycle.started)

    # Around everything, so that the answer to a bug has its headers too.
    around: ASGIApp = app
    if origins:
        around = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    return RequestContext(around, metrics)


@dataclass(frozen=True)
class _Task(Generic[TaskOptions, TaskAnswer]):
    """How a task looks over HTTP.

    Attributes:
        name: also the last part of its path.
        core: what answers.
        form: of a request.
        answer: the JSON of its answer.
        render: that JSON from what the core says, for the request of that id.
        summary: for the document of the interface.
        example: a JSON body, for the same.
    """

    name: Task
    core: type[Core[TaskOptions, Any, Any, Any, TaskAnswer]]
    form: Form[TaskOptions]
    answer: type[BaseModel]
    render: Callable[[ModelCard, list[TaskAnswer | ServiceError], str], BaseModel]
    summary: str
    example: dict[str, Any]


# A PNG of 8x8 pixels. An example names no option: the query of its request may give it.
_RED_SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlE"
    "QVR42mM8ISfHgA0wMeAAg1MCANDKARQfGKMRAAAAAElFTkSuQmCC"
)
_CLASSIFY = _Task(
    "classify",
    Classifier,
    Form(ClassifyOptionsBody, ClassifyJson),
    ClassifyAnswer,
    ClassifyAnswer.of,
    "Classify the images of one request",
    {"images": [_RED_SQUARE, _RED_SQUARE]},
)
_DETECT = _Task(
    "detect",
    DetectorCore,
    Form(DetectOptionsBody, DetectJson),
    DetectAnswer,
    DetectAnswer.of,
    "Detect the objects in the images of one request",
    {"image": _RED_SQUARE},
)


def _add_task(
    app: FastAPI,
    task: _Task[TaskOptions, TaskAnswer],
    catalogue: Catalogue,
    limits: Limits,
    metrics: Metrics,
    *,
    budget: ByteBudget,
) -> None:
    """Serve a task at `/v1/<name>`."""

    async def answer(request: Request) -> Response:
        """Takes one image as the body, one or many as multipart files, or as base64 in JSON.

        With one image, its failure is the status of the answer. With several, the status is
        200 and every image has its own. `Server-Timing` has the longest time in each stage.
        """
        with metrics.request(task.name, "http") as counted:
            head = read_head(request, limits, task.form)
            asked = head.options
            named = catalogue.find(task.core, asked.model) if head.names_model else None
            catalogue.check_room(task.core, counted, only=named, timeout_s=asked.timeout_s)
            with budget.hold(head.length) as held:
                body = await read_body(request, head, task.form, limits, held)
                metrics.body_bytes["http"].observe(body.size)
                counted.images = len(body.uploads)
                core = named or catalogue.find(task.core, body.options.model)
                counted.model = core.card.name
                answering = core.answer(body.uploads, body.options)
                outcomes = await _unless_disconnected(request, answering)
            counted.outcomes = outcomes
            identity, card = request_id(request), core.card

            def render() -> str:
                return task.render(card, outcomes, identity).model_dump_json(exclude_none=True)

            # The points of 32 images are a hundred thousand numbers: a tenth of a second in which
            # the event loop would serve nobody.
            explained = body.options.explain != "none"
            content = await asyncio.to_thread(render) if explained else render()
            return Response(
                content, media_type="application/json", headers=_server_timing(outcomes)
            )

    app.add_api_route(
        f"/v1/{task.name}",
        answer,
        methods=["POST"],
        response_model=task.answer,
        response_model_exclude_none=True,
        responses=_RESPONSES,
        openapi_extra=_request_schema(task),
        tags=[task.name],
        operation_id=task.name,
        summary=task.summary,
    )


def request_id(request: Request) -> str:
    """The id that `RequestContext` gave the request."""
    return str(request.state.request_id)


_EXPOSED_HEADERS = (request_ids.HEADER, "server-timing", "retry-after")
_LONGEST_PATH = 200  # characters in the log


class RequestContext:
    """Gives every request an id and its answer some headers, counts it and logs one line."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._responses = metrics.responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = request_ids.choose(Headers(scope=scope).get(request_ids.HEADER, ""))
        scope.setdefault("state", {})["request_id"] = identity
        start, status = perf_counter(), HTTPStatus.INTERNAL_SERVER_ERROR.value

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                identified = (request_ids.HEADER.encode(), identity.encode())
                message["headers"] = [*message["headers"], identified, *SECURITY_HEADERS]
            await send(message)

        # Whatever can be got has a head; the connection leaves the body out.
        as_get = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(as_get, receive, send_with_id)
        finally:
            self._responses.labels("http", str(status)).inc()
            quiet = scope["path"].startswith("/health/")
            (log.debug if quiet else log.info)(
                "request",
                method=scope["method"],
                path=scope["path"][:_LONGEST_PATH],
                status=status,
                duration_s=round(perf_counter() - start, 4),
                request_id=identity,
            )


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it when the client leaves first.

    Raises:
        Cancelled: the client left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("the client left")
        return working.result()
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _server_timing(outcomes: Sequence[Answer | ServiceError]) -> dict[str, str]:
    timings = [outcome.timing for outcome in outcomes if isinstance(outcome, Answer)]
    if not timings:
        return {}
    stages = {
        "decode": max(timing.decode_s for timing in timings),
        "queue": max(timing.queue_s for timing in timings),
        "compute": max(timing.compute_s for timing in timings),
    }
    parts = [f"{name};dur={seconds * 1e3:.2f}" for name, seconds in stages.items()]
    batch = max(timing.batch_size for timing in timings)
    return {"Server-Timing": ", ".join([*parts, f'batch;desc="{batch}"'])}


def _health(healthy: bool) -> JSONResponse:
    status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    body = HealthAnswer(status="ok" if healthy else "unavailable")
    return JSONResponse(body.model_dump(), status)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, ceil(error.retry_after_s)))
    if isinstance(error, UnsupportedCoding):
        headers["Accept-Encoding"] = ", ".join(content_coding.READ)
    body = ErrorAnswer(error=error_body(error, request_id(request)))
    return JSONResponse(body.model_dump(), error.http_status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    body = ErrorBody(
        code=phrase.lower().replace(" ", "_"),
        message=f"{phrase}: {request.method} {quoted(request.url.path)}",
        request_id=request_id(request),
    )
    headers = dict(error.headers or {})
    return JSONResponse(ErrorAnswer(error=body).model_dump(), error.status_code, headers)


async def _internal_error(request: Request, _: Exception) -> Response:
    body = ErrorBody(code="internal", message="internal error", request_id=request_id(request))
    return JSONResponse(ErrorAnswer(error=body).model_dump(), 500)


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


_RETRY_AFTER = {"Retry-After": _header("Seconds after which to try again.", "integer")}
_SERVER_TIMING = {"Server-Timing": _header("The longest time in each stage, milliseconds.")}
_ACCEPT_ENCODING = {"Accept-Encoding": _header("The codings that are read, if that is what is.")}
_REQUEST_ID = {"X-Request-Id": _header("That of the request, or a new one.")}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "headers": _REQUEST_ID | headers,
        **({"model": ErrorAnswer} if status >= HTTPStatus.BAD_REQUEST else {}),
    }
    for status, (description, headers) in {
        200: ("The answer; each image of several has its own status.", _SERVER_TIMING),
        400: ("The request or its one image cannot be used.", {}),
        404: ("No model of that name is served here.", {}),
        408: ("The request came too slowly.", {}),
        413: ("Too many bytes or pixels.", {}),
        414: ("Too many bytes in the URL.", {}),
        415: ("A content type, or a coding, that is not read here.", _ACCEPT_ENCODING),
        429: ("The queue is full, or too much is being received.", _RETRY_AFTER),
        431: ("Too many headers, or too many bytes in them.", {}),
        500: ("The image failed on the device.", {}),
        503: ("This replica is starting or leaving, or its device is lost.", _RETRY_AFTER),
        504: ("The deadline passed.", {}),
    }.items()
}


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _RESPONSES[status] for status in statuses}


_OK: dict[int | str, dict[str, Any]] = {
    200: {"description": "They are these.", "headers": _REQUEST_ID}
}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_HEALTH: dict[str, Any] = {
    "tags": ["health"],
    "response_model": HealthAnswer,
    "responses": {
        200: {"description": "It is so.", "headers": _REQUEST_ID},
        503: {"description": "It is not so.", "headers": _REQUEST_ID, "model": HealthAnswer},
    },
}


def _request_schema(task: _Task[Any, Any]) -> dict[str, Any]:
    """OpenAPI of the three kinds of body, and of the options in the query."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    options = {
        name: _as_text(schema)
        for name, schema in task.form.options.model_json_schema()["properties"].items()
    }
    multipart = {
        "type": "object",
        "properties": {
            "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
            **options,
        },
        "required": ["file"],
        "additionalProperties": False,
    }
    # Lists are separated by commas.
    as_one = {"style": "form", "explode": False}
    lists = {name: as_one for name, schema in options.items() if schema.get("type") == "array"}
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, **lists.get(name, {})}
            for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(RAW_TYPES, binary),
                "multipart/form-data": {"schema": multipart, "encoding": lists},
                "application/json": {
                    "schema": task.form.json.model_json_schema(),
                    "example": task.example,
                },
            },
        },
    }


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Of an option in a query or a form, where there is no null."""
    present = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return rest | present[0] if present else schema


TASKS: Mapping[bytes, tuple[Task, type[Core[Any, Any, Any, Any, Any]]]] = {
    f"/v1/{task.name}".encode(): (task.name, task.core) for task in (_CLASSIFY, _DETECT)
}
