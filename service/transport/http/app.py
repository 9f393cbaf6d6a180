"""The HTTP interface, put together."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from service.byte_budget import ByteBudget
from service.lifecycle import Lifecycle
from service.metrics.replica import Metrics
from service.metrics.requests import VISUALIZE
from service.security.access import Access
from service.settings.limits import Limits
from service.tasks.catalogue import Catalogue
from service.transport.http.callers import KnownCallers
from service.transport.http.context import EXPOSED_HEADERS, RequestContext
from service.transport.http.endpoints import Endpoints
from service.transport.http.failures import show_failures
from service.transport.http.oip import InferRequests, add_infer, add_open_inference
from service.transport.http.oip_control import add_control
from service.transport.http.oip_shared_memory import add_shared_memory
from service.transport.http.openapi import HEALTH
from service.transport.http.pages import Pages
from service.transport.http.schema import HealthAnswer
from service.transport.http.task import HttpTask
from service.transport.http.v1 import Requests, add_models, add_pictures, add_task
from service.transport.oip.control import Control
from service.transport.oip.inference import Inference


def create_app(
    tasks: Sequence[HttpTask[Any]],
    catalogue: Catalogue,
    lifecycle: Lifecycle,
    limits: Limits,
    metrics: Metrics,
    *,
    inference: Inference | None,
    control: Control | None,
    budget: ByteBudget,
    access: Access,
    version: str,
    origins: Sequence[str] = (),
    pages: Pages | None = None,
) -> ASGIApp:
    """The HTTP interface over the cores.

    Args:
        tasks: that are served.
        catalogue: the models.
        lifecycle: what the probes show.
        limits: of a request.
        metrics: where requests are counted.
        inference: the models as the Open Inference Protocol sees them, if it is served.
        control: what that protocol's clients call beside inference.
        budget: of the bytes of requests in flight.
        access: who may ask.
        version: of the server.
        origins: those of the pages whose scripts may use the interface; `*` means all.
        pages: that people see in a browser.
    """
    app = FastAPI(
        title="DAT Serve",
        version=version,
        description="Runs DAT vision models on images, and says where they looked.",
        # FastAPI loads scripts from another host; `pages` has its own.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # to whatever Host the request names
    )
    show_failures(app)
    requests = Requests(catalogue, limits, metrics, budget)
    endpoints = {f"/v1/{task.name}": add_task(app, task, requests) for task in tasks}
    endpoints[f"/v1/{VISUALIZE}"] = add_pictures(app, VISUALIZE, requests)
    add_models(app, catalogue)
    _add_health(app, lifecycle)
    infer = None
    if control is not None:
        add_control(app, control)
    if inference is not None:
        add_open_inference(app, inference, version=version)
        add_shared_memory(app, inference.memory)
        infer = add_infer(app, InferRequests(inference, limits, metrics, budget))

    # Around everything, so that the answer to a bug has its headers too.
    around: ASGIApp = KnownCallers(Endpoints(app, endpoints, infer), access)
    if origins:
        around = CORSMiddleware(  # before a page may show its key, it asks whether it may
            around,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    if pages is not None:
        around = pages.before(around)
    return RequestContext(around, metrics)


def _add_health(app: FastAPI, lifecycle: Lifecycle) -> None:
    @app.get("/health/live", **HEALTH, summary="Whether the process should go on")
    async def live() -> JSONResponse:
        """Fails when only a restart can help."""
        return _health(lifecycle.live)

    @app.get("/health/ready", **HEALTH, summary="Whether to send requests here")
    async def ready() -> JSONResponse:
        """Holds from the end of warm-up to the signal to leave."""
        return _health(lifecycle.ready)

    @app.get("/health/startup", **HEALTH, summary="Whether start-up is over")
    async def startup() -> JSONResponse:
        """Holds from the end of warm-up on."""
        return _health(lifecycle.started)


def _health(healthy: bool) -> JSONResponse:
    status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    body = HealthAnswer(status="ok" if healthy else "unavailable")
    return JSONResponse(body.model_dump(), status)
