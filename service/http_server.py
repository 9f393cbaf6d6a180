"""HTTP on an event loop: uvicorn with our connections; and metrics, on a loop of their own."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry, make_asgi_app
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import InvalidRequest
from service.metrics.replica import Metrics
from service.settings.server import Server
from service.threads import show_name
from service.transport.http.connections.connection import Connection
from service.transport.http.connections.held import Connections

_METRICS_CONNECTIONS = 16
_METRICS_RESERVE = 2
_METRICS_GRACE_S = 1


class HttpServer(uvicorn.Server):
    """uvicorn with our connections and without its signals: the replica decides when to leave."""

    server_state: Connections

    def __init__(
        self,
        app: ASGIApp,
        connections: Connections,
        grace_s: int,
        connection: Callable[..., Any] = Connection,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,  # type: ignore[arg-type]
                ws="none",
                interface="asgi3",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=grace_s,
            )
        )
        self.server_state = connections
        self._connection = connection

    @contextmanager
    def capture_signals(self) -> Iterator[None]:  # noqa: D102
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: D102
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self.server_state.watch())
            await super().serve(sockets)
            watch.cancel()

    async def adopt(self, connection: socket.socket) -> None:
        """Serve a connection that another process accepted.

        Raises:
            OSError: the client has left already.
        """
        loop = asyncio.get_running_loop()

        def serve() -> Any:
            return self._connection(
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                _loop=loop,
            )

        await loop.connect_accepted_socket(serve, connection)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: D102
        self.server_state.draining = True
        await super().shutdown(sockets)


@contextmanager
def serve_metrics(
    listener: socket.socket,
    server: Server,
    metrics: Metrics,
    shown: CollectorRegistry | None = None,
) -> Iterator[None]:
    """Serve metrics from a thread of its own, so that a busy event loop is seen.

    Args:
        listener: their port.
        server: settings of connections.
        metrics: count these connections.
        shown: the registry that is served; without it that of `metrics`.
    """
    most = min(_METRICS_CONNECTIONS, max(1, server.connections // 2))
    http_server = HttpServer(
        _metrics_app(shown or metrics.registry),
        Connections(server, most=most, reserve=_METRICS_RESERVE, port="metrics", metrics=metrics),
        _METRICS_GRACE_S,
    )

    def serve() -> None:
        show_name()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(http_server.serve(sockets=[listener]))

    thread = Thread(target=serve, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        http_server.should_exit = True
        thread.join()


def _metrics_app(registry: CollectorRegistry) -> ASGIApp:
    app: Any = make_asgi_app(registry)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        # The library fails on a query that is not text, or on a version that is not a number.
        except (TypeError, ValueError) as error:
            raise InvalidRequest("the query or the Accept headers cannot be read") from error

    return serve
