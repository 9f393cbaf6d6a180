"""One replica: opens the engine, the batcher, the core and the servers, and drains them.

The only module that sees all others.
"""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from time import perf_counter

import grpc
import structlog
import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

from service import served_model
from service.batcher import Batcher
from service.classifier import Classifier
from service.engine.engine import Engine, EngineInput, EngineOutput
from service.lifecycle import Lifecycle
from service.metrics import Metrics
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
        StartupError: a port is taken.
    """
    leave = _leave_on_signal()
    disable_created_metrics()  # a second series for each counter and histogram, read by nobody
    start = perf_counter()
    served = served_model.load(settings.model)
    metrics = Metrics(
        CollectorRegistry(),
        model=served.name,
        model_version=served.version,
        capacity=settings.batching.queue_limit,
    )
    metrics.load_seconds["read"].set(perf_counter() - start)
    log.info("model read", model=served.name, source=str(served.source), classes=len(served.labels))
    engine = Engine(
        served.network,
        metrics,
        **settings.engine.model_dump(),
        max_batch=settings.batching.max_batch,
        buckets=settings.batching.buckets,
    )
    batcher = Batcher[EngineInput, EngineOutput](
        engine.run_batch,
        max_batch=engine.max_batch,
        queue_limit=settings.batching.queue_limit,
        metrics=metrics,
    )
    lifecycle = Lifecycle(lambda: engine.healthy)
    decode_threads = settings.limits.decode_threads or os.cpu_count()
    with ThreadPoolExecutor(decode_threads, thread_name_prefix="decode") as decoders:
        classifier = Classifier(served, batcher, decoders, settings.limits, metrics)
        async with (
            _open_servers(settings, classifier, lifecycle, metrics) as servers,
            asyncio.TaskGroup() as tasks,
        ):
            consumer = tasks.create_task(batcher.run())
            lag = tasks.create_task(_measure_lag(metrics))
            await engine.load()
            batcher.open()
            lifecycle.started = True
            metrics.ready.set(1)
            await servers.health.show(serving=True)
            log.info(
                "ready",
                **servers.ports,
                device=str(engine.device),
                dtype=str(engine.dtype).removeprefix("torch."),
                max_batch=engine.max_batch,
                seconds=round(perf_counter() - start, 2),
            )
            await leave.wait()
            lifecycle.draining = True
            metrics.draining.set(1)
            await servers.health.show(serving=False)
            log.info("draining")
            await asyncio.sleep(settings.server.drain_delay_s)
            batcher.begin_drain()
            await servers.stop(settings.server.drain_grace_s)
            consumer.cancel()
            lag.cancel()
        engine.close()
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
    settings: Settings, classifier: Classifier, lifecycle: Lifecycle, metrics: Metrics
) -> AsyncIterator[_Servers]:
    """Serve HTTP, gRPC and metrics; not ready until `health` and `lifecycle` say so.

    Raises:
        StartupError: a port is taken, or the host is no address of this machine.
    """
    server = settings.server
    health = rpc.Health()
    await health.show(serving=False)
    app = rest.create_app(classifier, lifecycle, settings.limits, metrics, version("dat-serve"))
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
    rpc_server = rpc.create_server(classifier, health, settings.limits, metrics)
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
