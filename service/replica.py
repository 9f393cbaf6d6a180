"""One replica: opens the engines, the batchers, the core and the servers, and drains them.

The only module that sees all others.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from time import perf_counter
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics

from service import process
from service.computed_tasks import TASKS, ComputedTask
from service.engine.device import Device, open_devices
from service.event_loop import measure_lag, open_loop_pool
from service.http_server import serve_metrics
from service.leaving import await_threads, end, end_stuck, leave_on_signal
from service.lifecycle import Lifecycle
from service.local_models import LocalModels
from service.logs import LineWriter
from service.machine import raise_open_files
from service.memory import give_back_when_quiet
from service.metrics.replica import Metrics
from service.models.lineup import Lineup
from service.open_core import open_core, open_decoders
from service.open_model import OpenModel, Shared
from service.ports import Ports
from service.reloading import Reloads
from service.security.security import open_security
from service.servers import Servers, open_servers
from service.settings.settings import Settings
from service.tasks.catalogue import Catalogue
from service.tasks.core import AnyCore
from service.threads import need_spare
from service.transport.rpc.watching import Health

log = structlog.get_logger(__name__)

_CLOSE_S = 2.0  # beyond the grace, to end what is idle


async def serve(  # noqa: PLR0917
    settings: Settings,
    lineup: Lineup,
    ports: Ports,
    metrics_port: socket.socket,
    lines: LineWriter,
    tasks: Sequence[ComputedTask] = TASKS,
) -> None:
    """Run a replica until SIGTERM or SIGINT, then drain it.

    Args:
        settings: of all but the models.
        lineup: the models.
        ports: already open.
        metrics_port: likewise, of the metrics.
        lines: of the log.
        tasks: that are served.

    Raises:
        ModelUnusable: the weights or the class names of a model cannot be used.
        ModelFileError: sizes are given for a model that has a fixed one.
        DeviceUnavailable: the device is not there.
        StartupError: the gRPC port was taken, or keys and certificates were changed, meanwhile.
        RuntimeError: a device cannot be used, or the system gives no more threads.
    """
    reload = asyncio.Event()
    leave = leave_on_signal(
        settings.server.drain_delay_s + settings.server.drain_grace_s + _CLOSE_S,
        lines.flush,
        reload.set,
    )
    _prepare(settings)
    start = perf_counter()
    metrics = Metrics(CollectorRegistry())
    lines.on_dropped(metrics.log_lines_dropped.inc)
    devices = open_devices(
        settings.engine.device, settings.engine.threads, settings.engine.hang_timeout_s
    )
    process.compute_alone()
    of_loop = open_loop_pool()
    decoders = open_decoders(settings.limits, metrics)
    need_spare(sum(device.threads for device in devices))
    shared = Shared(settings, devices, metrics, tasks)
    catalogue = Catalogue()
    lifecycle = Lifecycle(
        lambda: all(device.healthy for device in devices),
        lambda: shared.dispatch.available and any(model.batcher.trusted for model in models.opened),
    )

    def answering(model: OpenModel) -> AnyCore:
        limits = settings.limits
        return open_core(model.facts, model.batcher, decoders, limits, model.metrics, shared.served)

    models = LocalModels(shared, answering, catalogue, lifecycle.changed)
    reloads = Reloads(settings, models, metrics, reload, metrics.registry.collect)
    async with AsyncExitStack() as serving:
        serving.enter_context(serve_metrics(metrics_port, settings.server, metrics))
        security = await serving.enter_async_context(open_security(settings.security, metrics))
        servers = await serving.enter_async_context(
            open_servers(
                shared.served, settings, ports, catalogue, lifecycle, metrics, security, reloads
            )
        )
        async with _watched(devices):
            loaded = await _unless(leave, models.load(lineup, decoders.pool))
        if loaded:
            _let_know(lifecycle, devices, models, servers.health)
            async with asyncio.TaskGroup() as group:
                background = [
                    *(group.create_task(device.watch()) for device in devices),
                    group.create_task(measure_lag(metrics)),
                    group.create_task(give_back_when_quiet()),
                ]
                process.loaded()
                models.start(group)
                await lifecycle.start()
                reloading = group.create_task(reloads.run())
                log.info(
                    "ready",
                    **servers.ports,
                    metrics_port=metrics_port.getsockname()[1],
                    models=[core.card.name for core in catalogue.cores],
                    default=catalogue.describe(None).card.name,
                    seconds=round(perf_counter() - start, 2),
                )
                await leave.wait()
                reloading.cancel()
                log.info("draining")
                metrics.draining.set(1)
                await lifecycle.drain()
                await asyncio.sleep(settings.server.drain_delay_s)
                await _stop(servers, models, devices, settings.server.drain_grace_s)
                models.stop()
                for task in background:
                    task.cancel()
    if not loaded or models.loading:
        end(0, "stopped", lines.flush, loading=True)  # nothing waits for an answer
    for pool in (of_loop, decoders.pool, shared.reader):
        pool.shutdown(wait=False, cancel_futures=True)
    closed = [device.close(_CLOSE_S / 4) for device in devices]
    if not all(closed) or not await_threads(_CLOSE_S / 2):
        end_stuck(lines.flush)
    log.info("stopped")


def _prepare(settings: Settings) -> None:
    """Set what holds for the whole process."""
    raise_open_files()
    process.leave_limits_to_us()
    process.choose_kernels(settings.engine.kernels, settings.engine.cache)
    process.compute_float32_in_full()
    disable_created_metrics()  # a second series for each counter and histogram, read by nobody


async def _unless(leave: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do work until the signal to leave, and say whether the work was done.

    Raises:
        Exception: whatever the work raised.
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
    """Watch the devices while models are loaded on them."""
    watching = [asyncio.create_task(device.watch()) for device in devices]
    try:
        yield
    finally:
        for task in watching:
            task.cancel()


def _let_know(
    lifecycle: Lifecycle,
    devices: Sequence[Device],
    models: LocalModels,
    health: Health,
) -> None:
    """Keep gRPC's health and the metrics up to date with lifecycle, devices and models."""

    async def show() -> None:
        working = any(device.healthy for device in devices)
        for model in models.opened:
            model.metrics.ready.set(lifecycle.started and working and model.batcher.trusted)
        await health.show(serving=lifecycle.ready)

    lifecycle.observe(show)
    for device in devices:
        device.on_loss(lifecycle.changed)


async def _stop(
    servers: Servers, models: LocalModels, devices: Sequence[Device], grace_s: float
) -> None:
    """Wait for what is in flight; shortly before the end of the grace tell the rest to give up."""

    def begin_drain() -> None:
        for batcher in models.batchers:
            batcher.begin_drain()

    def give_up() -> None:
        for device in devices:
            device.give_up("hung", "it is not done at the end of the time to drain")

    # A little before the connections are cut, so that callers can still be told.
    timer = asyncio.get_running_loop().call_later(0.9 * grace_s, give_up)
    try:
        await servers.stop(grace_s, begin_drain)
    finally:
        timer.cancel()
