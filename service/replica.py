"""One replica: opens the engines, the batchers, the core and the servers, and drains them.

The only module that sees all others.
"""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from time import perf_counter

import grpc
import structlog
import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from service.byte_budget import ByteBudget
from service.catalogue import Catalogue
from service.engine.device import compute_alone, open_devices
from service.lifecycle import Lifecycle
from service.memory import give_back_when_quiet, keep_freed
from service.metrics import Metrics
from service.model_file import choose_models
from service.open_model import Shared, open_model, open_workers
from service.settings import Server, Settings
from service.transport import rest, rpc

log = structlog.get_logger(__name__)

_LAG_PERIOD_S = 0.5


class StartupError(Exception):
    """The replica cannot start; the message says what to change."""


async def serve(settings: Settings) -> None:
    """Run a replica until SIGTERM or SIGINT, then drain it.

    Raises:
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
        ModelFileError: the model file cannot be used.
        DeviceUnavailable: the device is not there.
        StartupError: a port is taken.
    """
    leave = _leave_on_signal()
    disable_created_metrics()  # a second series for each counter and histogram, read by nobody
    start = perf_counter()
    lineup = choose_models(settings)
    metrics = Metrics(CollectorRegistry())
    devices = open_devices(settings.engine.device, settings.engine.threads)
    compute_alone()
    lifecycle = Lifecycle(lambda: all(device.healthy for device in devices))
    with open_workers(settings.limits.decoders) as workers:
        shared = Shared(settings, devices, workers, metrics)
        models = [open_model(entry, shared) for entry in lineup.models]
        catalogue = Catalogue([model.core for model in models], lineup.default)
        async with (
            _open_servers(settings, catalogue, lifecycle, metrics) as servers,
            asyncio.TaskGroup() as tasks,
        ):
            background = [tasks.create_task(model.batcher.run()) for model in models]
            background.append(tasks.create_task(_measure_lag(metrics)))
            background.append(tasks.create_task(give_back_when_quiet()))
            for model in models:
                await model.load()
                model.metrics.ready.set(1)
            keep_freed()
            for model in models:
                model.batcher.open()
            lifecycle.started = True
            await servers.health.show(serving=True)
            log.info(
                "ready",
                **servers.ports,
                models=[model.core.card.name for model in models],
                default=lineup.default or models[0].core.card.name,
                seconds=round(perf_counter() - start, 2),
            )
            await leave.wait()
            lifecycle.draining = True
            metrics.draining.set(1)
            await servers.health.show(serving=False)
            log.info("draining")
            await asyncio.sleep(settings.server.drain_delay_s)
            for model in models:
                model.batcher.begin_drain()
            await servers.stop(settings.server.drain_grace_s)
            for task in background:
                task.cancel()
        for device in devices:
            device.close()
    log.info("stopped")


def _leave_on_signal() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; a second one ends the process at once.

    It waits for the end of loading, which cannot be interrupted.
    """
    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        leave.set()

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    return leave


async def _measure_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        metrics.event_loop_lag.observe(max(0.0, loop.time() - due))


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: the replica decides when to leave."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True)
class _Servers:
    health: rpc.Health
    ports: dict[str, int]
    rpc_server: grpc.aio.Server
    http_server: uvicorn.Server
    http_task: asyncio.Task[None]

    async def stop(self, grace_s: float) -> None:
        """Stop listening, and return when all in flight is answered or the grace is over."""
        self.http_server.should_exit = True
        await asyncio.gather(self.rpc_server.stop(grace_s), self.http_task)


@asynccontextmanager
async def _open_servers(
    settings: Settings, catalogue: Catalogue, lifecycle: Lifecycle, metrics: Metrics
) -> AsyncIterator[_Servers]:
    """Serve HTTP, gRPC and metrics; not ready until `health` and `lifecycle` say so.

    Raises:
        StartupError: a port is taken, or the host is no address of this machine.
    """
    server = settings.server
    health = rpc.Health()
    await health.show(serving=False)
    budget = ByteBudget(settings.limits.bytes_in_flight, metrics.bytes_in_flight)
    app = rest.create_app(catalogue, lifecycle, settings.limits, metrics, version("dat-serve"))
    http_server = _HttpServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=ceil(server.drain_grace_s),
        )
    )
    rpc_server = rpc.create_server(
        catalogue, health, metrics, budget, limits=settings.limits, server=server
    )
    with _metrics_server(server, metrics) as metrics_port, _listen(server) as listener:
        rpc_port = _add_port(rpc_server, server)
        await rpc_server.start()
        http_task = asyncio.create_task(http_server.serve(sockets=[listener]))
        ports = {
            "http_port": listener.getsockname()[1],
            "grpc_port": rpc_port,
            "metrics_port": metrics_port,
        }
        servers = _Servers(health, ports, rpc_server, http_server, http_task)
        try:
            yield servers
        finally:
            await servers.stop(0)


def _listen(server: Server) -> socket.socket:
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    try:
        return socket.create_server((server.host, server.http_port), family=family, backlog=2048)
    except OSError as error:
        raise StartupError(f"HTTP cannot use port {server.http_port}: {error}") from error


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
            raise StartupError(f"gRPC cannot use port {server.grpc_port}: {error}") from error


@contextmanager
def _metrics_server(server: Server, metrics: Metrics) -> Iterator[int]:
    """Serve `/metrics` from a thread of its own, so that a busy event loop is seen."""
    try:
        httpd, thread = start_http_server(server.metrics_port, server.host, metrics.registry)
    except OSError as error:
        raise StartupError(f"metrics cannot use port {server.metrics_port}: {error}") from error
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
