"""Lets nobody but known callers in."""

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.security.access import Access
from service.transport.http.failures import service_error
from service.transport.http.probes import PROBES

_PROBES = tuple(path.decode() for path in PROBES)


class KnownCallers:
    """Answers who may not ask, without reading the body; handlers find who asks in the state.

    Probes are let pass whoever asks.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] == "http" and not scope["path"].startswith(_PROBES):
            caller = self._access.admit(scope["headers"])
            if isinstance(caller, ServiceError):
                answer = service_error(Request(scope), caller)
                await answer(scope, receive, send)
                return
            scope["state"]["caller"] = caller
        await self._app(scope, receive, send)
