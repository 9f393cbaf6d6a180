"""One replica: opens the engines, the batchers, the core and the servers, and drains them.

The only module that sees all others.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from time import perf_counter
from typing import Any

import grpc
import structlog
import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from service.catalogue import Catalogue
from service.engine.device import Device, compute_alone, open_devices
from service.leaving import await_threads, end, end_stuck, leave_on_signal
from service.lifecycle import Lifecycle
from service.memory import give_back_when_quiet, keep_freed
from service.metrics import Metrics
from service.model_file import choose_models
from service.open_model import OpenModel, Shared, open_model, open_workers
from service.settings import Server, Settings
from service.threads import need_spare, open_pool
from service.transport import rest, rpc

log = structlog.get_logger(__name__)

_LAG_PERIOD_S = 0.5
_CLOSE_S = 2.0  # beyond the grace, to end what is idle
# Of what the event loop hands over: answers with points, and memory that is given back.
_LOOP_THREADS = 4


class StartupError(Exception):
    """The replica cannot start; the message says what to change."""


async def serve(settings: Settings) -> None:
    """Run a replica until SIGTERM or SIGINT, then drain it.

    Raises:
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
        ModelFileError: the model file cannot be used.
        DeviceUnavailable: the device is not there.
        StartupError: a port is taken.
        RuntimeError: a device cannot be used, or the system gives no more threads.
    """
    leave = leave_on_signal(
        settings.server.drain_delay_s + settings.server.drain_grace_s + _CLOSE_S
    )
    disable_created_metrics()  # a second series for each counter and histogram, read by nobody
    start = perf_counter()
    lineup = choose_models(settings)
    metrics = Metrics(CollectorRegistry())
    devices = open_devices(
        settings.engine.device, settings.engine.threads, settings.engine.hang_timeout_s
    )
    compute_alone()
    of_loop, workers = open_pool(_LOOP_THREADS, "loop"), open_workers(settings.limits.decoders)
    asyncio.get_running_loop().set_default_executor(of_loop)
    need_spare(sum(device.threads for device in devices))
    shared = Shared(settings, devices, workers, metrics)
    models = [open_model(entry, shared) for entry in lineup.models]
    catalogue = Catalogue([model.core for model in models], lineup.default)
    lifecycle = Lifecycle(
        lambda: all(device.healthy for device in devices),
        lambda: shared.dispatch.available and any(model.batcher.trusted for model in models),
    )
    async with _open_servers(settings, catalogue, lifecycle, metrics) as servers:
        _let_know(lifecycle, devices, models, servers.health)
        async with _watched(devices):
            loaded = await _unless(leave, _load(models))
        if loaded:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(model.batcher.run()) for model in models]
                background += [tasks.create_task(device.watch()) for device in devices]
                background.append(tasks.create_task(_measure_lag(metrics)))
                background.append(tasks.create_task(give_back_when_quiet()))
                keep_freed()
                for model in models:
                    model.batcher.open()
                await lifecycle.start()
                log.info(
                    "ready",
                    **servers.ports,
                    models=[model.core.card.name for model in models],
                    default=lineup.default or models[0].core.card.name,
                    seconds=round(perf_counter() - start, 2),
                )
                await leave.wait()
                await lifecycle.drain()
                metrics.draining.set(1)
                log.info("draining")
                await asyncio.sleep(settings.server.drain_delay_s)
                for model in models:
                    model.batcher.begin_drain()
                await _stop(servers, devices, settings.server.drain_grace_s)
                for task in background:
                    task.cancel()
    if not loaded:
        end(0, "stopped", loading=True)  # nothing waits for an answer
    for pool in (of_loop, workers):
        pool.shutdown(wait=False, cancel_futures=True)
    closed = [device.close(_CLOSE_S / 4) for device in devices]
    if not all(closed) or not await_threads(_CLOSE_S / 2):
        end_stuck()
    log.info("stopped")


async def _load(models: Sequence[OpenModel]) -> None:
    for model in models:
        await model.load()


async def _unless(leave: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do work, or as much of it as there is time for before the signal; whether it was done.

    Raises:
        Exception: the work's own.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(leave.wait())
    await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not working.done():
        working.cancel()
        return False
    working.result()
    return not leave.is_set()


@asynccontextmanager
async def _watched(devices: Sequence[Device]) -> AsyncIterator[None]:
    """Watch devices while something is done with them that no batch waits for."""
    watching = [asyncio.create_task(device.watch()) for device in devices]
    try:
        yield
    finally:
        for task in watching:
            task.cancel()


def _let_know(
    lifecycle: Lifecycle,
    devices: Sequence[Device],
    models: Sequence[OpenModel],
    health: rpc.Health,
) -> None:
    """Let gRPC's health and the metrics follow the lifecycle, and that the devices and models."""

    async def show() -> None:
        working = any(device.healthy for device in devices)
        for model in models:
            model.metrics.ready.set(lifecycle.started and working and model.batcher.trusted)
        await health.show(serving=lifecycle.ready)

    lifecycle.observe(show)
    for device in devices:
        device.on_loss(lifecycle.changed)
    for model in models:
        model.batcher.on_change(lifecycle.changed)


async def _stop(servers: "_Servers", devices: Sequence[Device], grace_s: float) -> None:
    """Answer what is in flight, at the end of the grace that there will be no answer."""

    def give_up() -> None:
        for device in devices:
            device.give_up("hung", "it is not done at the end of the time to drain")

    # A little before the connections are cut, so that callers can still be told.
    timer = asyncio.get_running_loop().call_later(0.9 * grace_s, give_up)
    try:
        await servers.stop(grace_s)
    finally:
        timer.cancel()


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
    rpc_server = rpc.create_server(catalogue, health, settings.limits, metrics)
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
    try:
        return rpc_server.add_insecure_port(f"{host}:{server.grpc_port}")
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
