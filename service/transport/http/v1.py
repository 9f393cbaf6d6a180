"""The routes of our own interface, version 1: the tasks and the models."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from service.byte_budget import ByteBudget
from service.errors import Cancelled, ServiceError
from service.metrics import Metrics
from service.settings import Limits
from service.tasks.catalogue import Catalogue
from service.tasks.core import Answer
from service.transport.http.context import request_id
from service.transport.http.endpoints import Endpoint
from service.transport.http.openapi import NAME, OK, RESPONSES, only, request_schema
from service.transport.http.schema import LabelledModelBody, ModelBody, ModelsAnswer
from service.transport.http.task import HttpTask
from service.transport.http.uploads import read_body, read_head

Outcomes = list[Any]  # what became of each image


def add_task(
    app: FastAPI,
    task: HttpTask[Any],
    catalogue: Catalogue,
    limits: Limits,
    metrics: Metrics,
    *,
    budget: ByteBudget,
) -> Endpoint:
    """Serve a task at `/v1/<name>`.

    Returns:
        What answers its requests.
    """

    async def answer(request: Request) -> Response:
        """Takes one image as the body, one or many as multipart files, or as base64 in JSON.

        With one image, its failure is the status of the answer. With several, the status is
        200 and every image has its own. `Server-Timing` has the longest time in each stage.
        """
        with metrics.request(task.name, "http") as counted:
            head = read_head(request, limits, task.form)
            asked = head.options
            only = catalogue.find(task.name, asked.model) if head.names_model else None
            catalogue.check_room(
                task.name, counted, only=only, timeout_s=asked.timeout_s, priority=asked.priority
            )
            del only  # another version may serve when the body is there
            with budget.hold(head.length, asked.priority) as held:
                body = await read_body(request, head, task.form, limits, held)
                metrics.body_bytes["http"].observe(body.size)
                counted.images = len(body.uploads)
                name = asked.model if head.names_model else body.options.model
                core = catalogue.find(task.name, name)
                counted.model = core.card.name
                identity, card = request_id(request), core.card
                with request.state.caller.spend(len(body.uploads)):
                    answering = core.answer(body.uploads, body.options, identity)
                    outcomes = await _unless_disconnected(request, answering)
            counted.outcomes = outcomes

            def render() -> str:
                return task.render(card, outcomes, identity)

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
        responses=RESPONSES,
        openapi_extra=request_schema(task),
        tags=[task.name],
        operation_id=task.name,
        summary=task.summary,
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


async def _unless_disconnected(request: Request, work: Awaitable[Outcomes]) -> Outcomes:
    """Await `work`, and cancel it when the client leaves first.

    Raises:
        Cancelled: the client left.
    """
    working = asyncio.current_task()
    assert working is not None
    leaving = asyncio.create_task(_cancel_when_left(request, working))
    try:
        return await work
    except asyncio.CancelledError:
        if not leaving.done() or working.uncancel():
            raise
        raise Cancelled("the client left") from None
    finally:
        leaving.cancel()


async def _cancel_when_left(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


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
