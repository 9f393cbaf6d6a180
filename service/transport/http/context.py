"""What every HTTP request has: an id, headers of its answer, a line of the log."""

from http import HTTPStatus
from time import perf_counter

import structlog
from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics.replica import Metrics
from service.transport import request_id as request_ids
from service.transport.http.connections.refusals import SECURITY_HEADERS
from service.transport.http.probes import PROBES

log = structlog.get_logger(__name__)


def request_id(request: Request) -> str:
    """The id that `RequestContext` gave the request."""
    return str(request.state.request_id)


EXPOSED_HEADERS = (
    request_ids.HEADER, "server-timing", "retry-after", "warning",
    "inference-header-content-length",
)  # fmt: skip
_PROBES = tuple(path.decode() for path in PROBES)
_LONGEST_PATH = 200  # characters in the log


class RequestContext:
    """Gives every request an id and its answer some headers, counts it and logs one line.

    What a page is answered with has headers of its own, in the state of the request.
    """

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
                own = scope["state"].get("headers", SECURITY_HEADERS)
                message["headers"] = [*message["headers"], identified, *own]
            await send(message)

        # A HEAD is answered as a GET would be; the connection leaves the body out.
        as_get = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(as_get, receive, send_with_id)
        finally:
            self._responses.labels("http", str(status)).inc()
            quiet = scope["path"].startswith(_PROBES) or "headers" in scope["state"]
            (log.debug if quiet else log.info)(
                "request",
                method=scope["method"],
                path=scope["path"][:_LONGEST_PATH],
                status=status,
                duration_s=round(perf_counter() - start, 4),
                request_id=identity,
            )
