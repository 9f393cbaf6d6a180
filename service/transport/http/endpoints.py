"""What answers the requests of tasks, without the layers that FastAPI has around it."""

from collections.abc import Awaitable, Callable, Mapping
from re import compile as pattern

from fastapi import Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.transport.http.failures import internal_error, service_error

# The path of the Open Inference Protocol that has a model, and perhaps its version.
INFER = pattern(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")

Endpoint = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """Gives the requests of tasks to what answers them, and all others to the application.

    FastAPI documents the tasks, and would look for their route, for its dependencies, for limits
    and for telemetry that they do not have: a sixth of what the event loop does for a request.

    Args:
        app: has the same endpoints.
        endpoints: by path; of `POST`.
        infer: that of the Open Inference Protocol, if it is served.
    """

    def __init__(
        self, app: ASGIApp, endpoints: Mapping[str, Endpoint], infer: Endpoint | None = None
    ) -> None:
        self._app = app
        self._endpoints = endpoints
        self._infer = infer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        endpoint = self._endpoints.get(scope["path"])
        if self._infer is not None and (found := INFER.fullmatch(scope["path"])):
            endpoint = self._infer
            scope["path_params"] = {"model": found[1], "version": found[2] or ""}
        if endpoint is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except ServiceError as error:
            response = service_error(request, error)
        except Exception:
            await internal_error(request)(scope, receive, send)
            raise  # uvicorn logs it
        await response(scope, receive, send)
