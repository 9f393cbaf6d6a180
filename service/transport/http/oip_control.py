"""The routes of the Open Inference Protocol beside inference: how models are run and loaded."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from service.transport.http.oip_document import (
    CONFIG,
    INDEX,
    MODEL,
    REPOSITORY_CHANGE,
    STATISTICS,
    VERSION,
    names_of,
)
from service.transport.http.small_body import read_small
from service.transport.oip.control import Control


class _IndexBody(BaseModel):
    """What an index is asked with; what is not known is ignored.

    Attributes:
        ready: only the models that answer.
    """

    ready: bool = False


class _ChangeBody(BaseModel):
    """What a load or an unload is asked with.

    Attributes:
        parameters: of it, by name.
    """

    parameters: dict[str, Any] = {}


def add_control(app: FastAPI, control: Control) -> None:
    """Serve what clients call beside inference.

    To be called before the routes of single models are added, for `/v2/models/stats` is none.

    Args:
        app: has it from now on.
        control: answers.
    """

    async def config(request: Request) -> JSONResponse:
        """A `ModelConfig` as the protocol's gRPC has it."""
        return JSONResponse(control.config(*names_of(request)))

    async def statistics(request: Request) -> JSONResponse:
        """Counts and times since the start, equal to those of the metrics."""
        return JSONResponse(await control.statistics(*names_of(request)))

    async def index(request: Request) -> JSONResponse:
        """The models of the settings, and what is in memory."""
        body = await read_small(request, _IndexBody)
        return JSONResponse(await control.index(ready=body.ready))

    async def load(request: Request) -> JSONResponse:
        """Loads a model of the settings; one that serves is loaded anew, and goes on meanwhile."""
        body = await read_small(request, _ChangeBody)
        await control.load(names_of(request)[0], body.parameters)
        return JSONResponse({})

    async def unload(request: Request) -> JSONResponse:
        """Takes a model out of service; its last requests are answered."""
        await read_small(request, _ChangeBody)
        await control.unload(names_of(request)[0])
        return JSONResponse({})

    app.add_api_route("/v2/models/stats", statistics, summary="What all models did", **STATISTICS)
    for path, document in ((MODEL, True), (VERSION, False)):
        shown: dict[str, Any] = {"include_in_schema": document}
        app.add_api_route(f"{path}/config", config, summary="How a model is run", **shown, **CONFIG)
        app.add_api_route(
            f"{path}/stats", statistics, summary="What a model did", **shown, **STATISTICS
        )
    repository = "/v2/repository"
    app.add_api_route(f"{repository}/index", index, methods=["POST"], summary="All models", **INDEX)
    for change, summary in ((load, "Load a model"), (unload, "Unload a model")):
        app.add_api_route(
            f"{repository}/models/{{model}}/{change.__name__}",
            change,
            methods=["POST"],
            summary=summary,
            **REPOSITORY_CHANGE,
        )
