"""What does the application hear of a request, and who answers what it raises?"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ServiceError
from service.transport.http.connections.refusals import unidentified


class Exchange:
    """The application for one request.

    Attributes:
        fault: why the rest of the body cannot be read; raised from `receive`.
    """

    def __init__(self, app: Any) -> None:
        self._app: ASGIApp = app
        self.fault: ServiceError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        async def receive_or_fail() -> Message:
            message = await receive()
            if self.fault is not None:
                raise self.fault
            return message

        try:
            await self._app(scope, receive_or_fail, send)
        except ServiceError as error:  # the application has no handler for it
            headers, body = unidentified(error, scope["path"])
            status = int(error.http_status)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


class _TurnedAway:
    """Stands for uvicorn's cycle of a request that was turned away: its answer is complete."""

    response_complete = True
    waiting_for_100_continue = False
    keep_alive = True
    disconnected = False
    message_event = asyncio.Event()


TURNED_AWAY: Any = _TurnedAway()
