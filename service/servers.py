"""The servers of a replica: HTTP and gRPC on its event loop."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil

import grpc

from service.byte_budget import ByteBudget
from service.command_errors import StartupError
from service.http_server import HttpServer
from service.lifecycle import Lifecycle
from service.metrics.replica import Metrics
from service.metrics.requests import VISUALIZE
from service.ports import Ports
from service.security.security import Security, Tls
from service.served_tasks import ServedTask
from service.settings.settings import Settings
from service.tasks.catalogue import Catalogue
from service.tasks.repository import GuardedRepository, Repository
from service.transport.http.app import create_app
from service.transport.http.connections.connection import Connection
from service.transport.http.connections.held import Connections
from service.transport.http.connections.over_tls import over_tls
from service.transport.http.gate import Gate
from service.transport.http.pages import Pages
from service.transport.oip.control import Control
from service.transport.oip.inference import Inference
from service.transport.rpc.credentials import server_credentials
from service.transport.rpc.last_calls import LastCalls
from service.transport.rpc.oip import OPEN_INFERENCE_SERVICE
from service.transport.rpc.picture_messages import RPC_VISUALIZE
from service.transport.rpc.server import create_server
from service.transport.rpc.v1 import MODEL_SERVICE
from service.transport.rpc.watching import Health
from service.transport.unread import UnreadAnswers

# As many connections beyond the limit may ask for the health of the replica.
_RESERVE = 8
_ACCEPTED_AT_ONCE = 16
# So long a stop waits for a moment without new calls, and then for the answers of the last ones.
_LAST_CALLS_S = 1.0


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
    _last_calls: LastCalls
    _http_server: HttpServer
    _http_task: asyncio.Task[None]

    @property
    def connections(self) -> int:
        """Open HTTP connections."""
        return len(self._http_server.server_state.connections)

    async def adopt(self, connection: socket.socket) -> None:
        """Serve an HTTP connection that another process accepted; see `HttpServer.adopt`.

        Raises:
            OSError: its client has left already.
        """
        await self._http_server.adopt(connection)

    async def stop(self, grace_s: float, closed: Callable[[], None] = lambda: None) -> None:
        """Stop listening, and return when all in flight is answered or the grace is over.

        Args:
            grace_s: seconds.
            closed: is called when nothing new comes any more, but on what is open.
        """
        self._http_server.should_exit = True
        patience_s = min(_LAST_CALLS_S, grace_s / 10)
        await self._last_calls.hold(patience_s)
        stopping = asyncio.create_task(self._rpc_server.stop(grace_s))
        await asyncio.sleep(0)  # from here on gRPC takes no call
        await self._last_calls.answer(patience_s)
        closed()
        await asyncio.gather(stopping, self._http_task)


@asynccontextmanager
async def open_servers(  # noqa: PLR0917
    tasks: Sequence[ServedTask],
    settings: Settings,
    ports: Ports,
    catalogue: Catalogue,
    lifecycle: Lifecycle,
    metrics: Metrics,
    security: Security,
    repository: Repository,
) -> AsyncIterator[Servers]:
    """Serve HTTP and gRPC; not ready until `health` and `lifecycle` say so.

    Raises:
        StartupError: the gRPC port is taken.
    """
    server = settings.server
    names = [*(task.name for task in tasks), VISUALIZE]
    for name in names:
        metrics.requests.add_task(name)
    services = [*(task.rpc.service for task in tasks), RPC_VISUALIZE.service, MODEL_SERVICE]
    inference: Inference | None = None
    control: Control | None = None
    if server.open_inference:
        as_tensors = [task.oip for task in tasks if task.oip is not None]
        inference = Inference(as_tensors, catalogue, lifecycle, settings.limits)
        guarded = GuardedRepository(repository, control=server.model_control)
        control = Control(inference, guarded, settings.limits)
        inference.extensions = (*inference.extensions, *control.extensions)
        if inference.memory.enabled:
            inference.extensions = (*inference.extensions, "system_shared_memory")
        services.append(OPEN_INFERENCE_SERVICE)
    health = Health(services)
    await health.show(serving=False)
    limits = settings.limits
    budget = ByteBudget(
        limits.bytes_in_flight, metrics.bytes_in_flight, within_s=limits.default_timeout_s
    )
    unread = UnreadAnswers(limits.bytes_in_flight)
    pages = Pages(settings.limits) if server.playground else None
    http_server = HttpServer(
        create_app(
            [task.http for task in tasks],
            catalogue,
            lifecycle,
            settings.limits,
            metrics,
            inference=inference,
            control=control,
            budget=budget,
            access=security.access,
            version=version("dat-serve"),
            origins=server.cors_origins,
            pages=pages,
        ),
        Connections(
            server,
            most=server.connections,
            reserve=_RESERVE,
            port="http",
            metrics=metrics,
            gate=Gate(
                catalogue,
                names,
                metrics,
                security.access,
                cross_origin=bool(server.cors_origins),
                open_paths=() if pages is None else pages.paths,
            ),
            unread=unread,
            request_read=catalogue.request_read,
        ),
        ceil(server.drain_grace_s),
        Connection if security.tls is None else over_tls(security.tls),
    )
    last_calls = LastCalls()
    rpc_server = create_server(
        [task.rpc for task in tasks],
        catalogue,
        health,
        metrics,
        budget,
        unread,
        inference=inference,
        control=control,
        last_calls=last_calls,
        access=security.access,
        limits=settings.limits,
        server=server,
        version=version("dat-serve"),
        shared=ports.shared,
    )
    rpc_port = _add_port(rpc_server, server.host, ports, security.tls)
    if pages is not None:
        pages.tell(grpc_port=rpc_port)
    await rpc_server.start()
    listeners, numbers = [], {"grpc_port": rpc_port}
    if ports.http is not None:
        # libuv takes one connection of a socket in a turn of the event loop, and a busy loop has a
        # hundred turns a second: behind a crowd of new clients a probe would wait for seconds.
        listeners = [ports.http, *(ports.http.dup() for _ in range(_ACCEPTED_AT_ONCE - 1))]
        numbers["http_port"] = ports.http.getsockname()[1]
    http_task = asyncio.create_task(http_server.serve(sockets=listeners))
    servers = Servers(health, numbers, rpc_server, last_calls, http_server, http_task)
    try:
        yield servers
    finally:
        await servers.stop(0)
        if inference is not None:
            inference.memory.close()


def _add_port(rpc_server: grpc.aio.Server, host: str, ports: Ports, tls: Tls | None) -> int:
    port = ports.grpc
    with ExitStack() as until_bound:
        if host == "0.0.0.0" and not ports.shared:  # noqa: S104
            # gRPC takes this for all addresses of IPv6 too, unless those are taken.
            with suppress(OSError):  # without IPv6 there are none
                taken = socket.create_server(("::", port), family=socket.AF_INET6)
                port = until_bound.enter_context(taken).getsockname()[1]
        try:
            at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            if tls is None:
                return rpc_server.add_insecure_port(at)
            return rpc_server.add_secure_port(at, server_credentials(tls))
        except RuntimeError as error:
            raise StartupError(
                f"gRPC cannot use port {port}: {error}; change DAT_SERVER__GRPC_PORT"
            ) from error
