"""The servers of a replica: HTTP and gRPC on its event loop, metrics on one of their own."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from threading import Thread
from typing import Any

import grpc
import uvicorn
import uvloop
from prometheus_client import make_asgi_app
from starlette.types import ASGIApp, Receive, Scope, Send

from service.byte_budget import ByteBudget
from service.command_errors import StartupError
from service.errors import InvalidRequest
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.ports import Ports
from service.served_tasks import ServedTask
from service.settings import Server, Settings
from service.tasks.catalogue import Catalogue
from service.threads import show_name
from service.transport.http.app import create_app
from service.transport.http.connections import Connection, Connections
from service.transport.http.gate import Gate
from service.transport.rpc.server import create_server
from service.transport.rpc.v1 import MODEL_SERVICE
from service.transport.rpc.watching import Health

# As many connections beyond the limit may ask for the health of the replica.
_RESERVE = 8
_ACCEPTED_AT_ONCE = 16
_METRICS_CONNECTIONS = 16
_METRICS_RESERVE = 2
_METRICS_GRACE_S = 1


@dataclass(frozen=True)
class Servers:
    """What serves.

    Attributes:
        health: what gRPC says of it.
        ports: by name, as they are logged.
    """

    health: Health
    ports: dict[str, int]
    _rpc_server: grpc.aio.Server
    _http_server: uvicorn.Server
    _http_task: asyncio.Task[None]

    async def stop(self, grace_s: float) -> None:
        """Stop listening, and return when all in flight is answered or the grace is over."""
        self._http_server.should_exit = True
        await asyncio.gather(self._rpc_server.stop(grace_s), self._http_task)


@asynccontextmanager
async def open_servers(  # noqa: PLR0917
    tasks: Sequence[ServedTask],
    settings: Settings,
    ports: Ports,
    catalogue: Catalogue,
    lifecycle: Lifecycle,
    metrics: Metrics,
) -> AsyncIterator[Servers]:
    """Serve HTTP, gRPC and metrics; not ready until `health` and `lifecycle` say so.

    Raises:
        StartupError: the gRPC port is taken.
    """
    server = settings.server
    for task in tasks:
        metrics.add_task(task.name)
    health = Health([*(task.rpc.service for task in tasks), MODEL_SERVICE])
    await health.show(serving=False)
    budget = ByteBudget(settings.limits.bytes_in_flight, metrics.bytes_in_flight)
    http_server = _HttpServer(
        create_app(
            [task.http for task in tasks],
            catalogue,
            lifecycle,
            settings.limits,
            metrics,
            budget=budget,
            version=version("dat-serve"),
            origins=server.cors_origins,
        ),
        Connections(
            server,
            most=server.connections,
            reserve=_RESERVE,
            port="http",
            metrics=metrics,
            gate=Gate(catalogue, [task.name for task in tasks], metrics),
        ),
        ceil(server.drain_grace_s),
    )
    rpc_server = create_server(
        [task.rpc for task in tasks],
        catalogue,
        health,
        metrics,
        budget,
        limits=settings.limits,
        server=server,
    )
    rpc_port = _add_port(rpc_server, server)
    with _metrics_server(ports.metrics, server, metrics):
        await rpc_server.start()
        # libuv takes one connection of a socket in a turn of the event loop, and a busy loop has a
        # hundred turns a second: behind a crowd of new clients a probe would wait for seconds.
        listeners = [ports.http, *(ports.http.dup() for _ in range(_ACCEPTED_AT_ONCE - 1))]
        http_task = asyncio.create_task(http_server.serve(sockets=listeners))
        numbers = {
            "http_port": ports.http.getsockname()[1],
            "grpc_port": rpc_port,
            "metrics_port": ports.metrics.getsockname()[1],
        }
        servers = Servers(health, numbers, rpc_server, http_server, http_task)
        try:
            yield servers
        finally:
            await servers.stop(0)


class _HttpServer(uvicorn.Server):
    """uvicorn with our connections and without its signals: the replica decides when to leave."""

    server_state: Connections

    def __init__(self, app: ASGIApp, connections: Connections, grace_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
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

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self.server_state.watch())
            await super().serve(sockets)
            watch.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.draining = True
        await super().shutdown(sockets)


def _add_port(rpc_server: grpc.aio.Server, server: Server) -> int:
    host = f"[{server.host}]" if ":" in server.host else server.host
    port = server.grpc_port
    with ExitStack() as until_bound:
        if server.host == "0.0.0.0":  # noqa: S104
            # gRPC takes this for all addresses of IPv6 too, unless those are taken.
            with suppress(OSError):  # without IPv6 there are none
                taken = socket.create_server(("::", port), family=socket.AF_INET6)
                port = until_bound.enter_context(taken).getsockname()[1]
        try:
            return rpc_server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise StartupError(
                f"gRPC cannot use port {server.grpc_port}: {error}; change DAT_SERVER__GRPC_PORT"
            ) from error


@contextmanager
def _metrics_server(listener: socket.socket, server: Server, metrics: Metrics) -> Iterator[None]:
    """Serve metrics from a thread of its own, so that a busy event loop is seen."""
    most = min(_METRICS_CONNECTIONS, max(1, server.connections // 2))
    http_server = _HttpServer(
        _metrics_app(metrics),
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


def _metrics_app(metrics: Metrics) -> ASGIApp:
    app: Any = make_asgi_app(metrics.registry)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        # The library fails on a query that is not text, or on a version that is not a number.
        except (TypeError, ValueError) as error:
            raise InvalidRequest("the query or the Accept headers cannot be read") from error

    return serve
