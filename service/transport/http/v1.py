"""The routes of our own interface, version 1: the tasks, pictures and the models."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from service.byte_budget import ByteBudget
from service.metrics.replica import Metrics
from service.models.card import ModelCard
from service.settings.limits import Limits
from service.tasks.catalogue import Catalogue
from service.tasks.core import AnyCore, Options
from service.tasks.pictures import PicturedCore, PictureOptions
from service.transport.http.context import request_id
from service.transport.http.endpoints import Endpoint
from service.transport.http.exchange import server_timing, unless_disconnected
from service.transport.http.openapi import NAME, OK, PICTURES, RESPONSES, only, request_schema
from service.transport.http.picture_schema import EXAMPLE, FORM, SUMMARY
from service.transport.http.schema import LabelledModelBody, ModelBody, ModelsAnswer
from service.transport.http.task import HttpTask
from service.transport.http.uploads import Body, Form, read_body, read_head

Outcomes = list[Any]  # what became of each image
# What a core makes of the images of a request, and what answers for the outcomes.
Work = Callable[[AnyCore, Body, str], Awaitable[Outcomes]]
Respond = Callable[[ModelCard, Options, Outcomes, str], Awaitable[Response]]


class Requests:
    """The way of every request for images, whatever is made of them."""

    def __init__(
        self, catalogue: Catalogue, limits: Limits, metrics: Metrics, budget: ByteBudget
    ) -> None:
        self._catalogue = catalogue
        self._limits = limits
        self._metrics = metrics
        self._budget = budget

    async def answer(
        self, request: Request, name: str, form: Form, work: Work, respond: Respond
    ) -> Response:
        """Answer a request.

        Args:
            request: of which nothing was read but its head.
            name: of what it asks for; the models that have it among their tasks may answer.
            form: of such requests.
            work: what a core does with its images.
            respond: makes the answer of what became of them.

        Raises:
            ServiceError: the request cannot be answered; see `service.errors`.
        """
        catalogue, limits, metrics = self._catalogue, self._limits, self._metrics
        with metrics.requests.count(name, "http") as counted:
            head = read_head(request, limits, form)
            asked = head.options
            only = catalogue.find(name, asked.model) if head.names_model else None
            catalogue.check_room(
                name, counted, only=only, timeout_s=asked.timeout_s, priority=asked.priority
            )
            del only  # another version may serve when the body is there
            with self._budget.hold(head.length, asked.priority) as held:
                body = await read_body(request, head, form, limits, held)
                metrics.body_bytes["http"].observe(body.size)
                counted.images = len(body.uploads)
                model = asked.model if head.names_model else body.options.model
                core = catalogue.find(name, model)
                counted.model = core.card.name
                identity, card = request_id(request), core.card
                with request.state.caller.spend(len(body.uploads)):
                    working = work(core, body, identity)
                    outcomes = await unless_disconnected(request, working)
            counted.outcomes = outcomes
            return await respond(card, body.options, outcomes, identity)


def add_task(app: FastAPI, task: HttpTask[Any], requests: Requests) -> Endpoint:
    """Serve a task at `/v1/<name>`.

    Returns:
        What answers its requests.
    """

    async def work(core: AnyCore, body: Body, identity: str) -> Outcomes:
        return await core.answer(body.uploads, body.options, identity)

    async def respond(
        card: ModelCard, options: Options, outcomes: Outcomes, identity: str
    ) -> Response:
        def render() -> str:
            return task.render(card, outcomes, identity)

        # The points of 32 images are a hundred thousand numbers: a tenth of a second in which
        # the event loop would serve nobody.
        content = await asyncio.to_thread(render) if options.long_answer else render()
        return Response(content, media_type="application/json", headers=server_timing(outcomes))

    async def answer(request: Request) -> Response:
        """Takes one image as the body, one or many as multipart files, or as base64 in JSON.

        With one image, its failure is the status of the answer. With several, the status is
        200 and every image has its own. `Server-Timing` has the longest time in each stage.
        """
        return await requests.answer(request, task.name, task.form, work, respond)

    app.add_api_route(
        f"/v1/{task.name}",
        answer,
        methods=["POST"],
        response_model=task.answer,
        response_model_exclude_none=True,
        responses=RESPONSES,
        openapi_extra=request_schema(task.form, task.example),
        tags=[task.name],
        operation_id=task.name,
        summary=task.summary,
    )
    return answer


def add_pictures(app: FastAPI, name: str, requests: Requests) -> Endpoint:
    """Serve pictures of the answers of all models that can be drawn, at `/v1/<name>`.

    Returns:
        What answers the requests.
    """

    async def work(core: AnyCore, body: Body, identity: str) -> Outcomes:
        assert isinstance(core, PicturedCore), "no other core has this task"
        assert isinstance(body.options, PictureOptions), "as the form says"
        return await core.picture(body.uploads, body.options, identity)

    async def respond(
        _card: ModelCard, _options: Options, outcomes: Outcomes, _identity: str
    ) -> Response:
        (answer,) = outcomes
        picture = answer.picture
        headers = server_timing(outcomes)
        return Response(picture.data, media_type=picture.media_type, headers=headers)

    async def answer(request: Request) -> Response:
        """Takes one image, as the tasks do, and answers with a picture of it.

        `Server-Timing` has the time of each stage, and of drawing as `render`.
        """
        return await requests.answer(request, name, FORM, work, respond)

    app.add_api_route(
        f"/v1/{name}",
        answer,
        methods=["POST"],
        response_class=Response,
        responses=PICTURES,
        openapi_extra=request_schema(FORM, EXAMPLE),
        tags=[name],
        operation_id=name,
        summary=SUMMARY,
    )
    return answer


def add_models(app: FastAPI, catalogue: Catalogue) -> None:
    """Serve the list of models, and what is known of each."""

    @app.get(
        "/v1/models",
        response_model_exclude_none=True,
        responses=OK | only(401, 403, 429, 500),
        tags=["models"],
        summary="The models that are served",
    )
    async def models() -> ModelsAnswer:
        """What each model is, and what one image costs it."""
        return ModelsAnswer(models=[ModelBody.of(core, catalogue) for core in catalogue.cores])

    @app.get(
        "/v1/models/{name}",
        response_model_exclude_none=True,
        responses=OK | only(401, 403, 404, 429, 500),
        openapi_extra={"parameters": [NAME]},
        tags=["models"],
        summary="One model, with the names of its classes",
    )
    async def model(request: Request) -> LabelledModelBody:
        """The names are in order of the class index."""
        # Not an argument: FastAPI would document a 422 that never comes.
        return LabelledModelBody.of(catalogue.describe(request.path_params["name"]), catalogue)
