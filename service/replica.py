"""One replica: opens the engines, the batchers, the core and the servers, and drains them.

The only module that sees all others.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics

from service import process
from service.engine.device import Device, open_devices
from service.leaving import await_threads, end, end_stuck, leave_on_signal
from service.lifecycle import Lifecycle
from service.logs import LineWriter
from service.machine import raise_open_files
from service.memory import give_back_when_quiet
from service.metrics import Metrics
from service.models.lineup import Lineup
from service.open_model import OpenModel, Shared, open_decoders, open_model
from service.ports import Ports
from service.security.security import open_security
from service.served_tasks import TASKS, ServedTask
from service.servers import Servers, open_servers
from service.settings import Settings
from service.tasks.catalogue import Catalogue
from service.threads import need_spare, open_pool
from service.transport.rpc.watching import Health

log = structlog.get_logger(__name__)

_LAG_PERIOD_S = 0.5
_CLOSE_S = 2.0  # beyond the grace, to end what is idle
# Of what the event loop hands over: answers with points, and memory that is given back.
_LOOP_THREADS = 4


async def serve(
    settings: Settings,
    lineup: Lineup,
    ports: Ports,
    lines: LineWriter,
    tasks: Sequence[ServedTask] = TASKS,
) -> None:
    """Run a replica until SIGTERM or SIGINT, then drain it.

    Args:
        settings: of all but the models.
        lineup: the models.
        ports: already open.
        lines: of the log.
        tasks: that are served.

    Raises:
        ModelUnusable: the weights or the class names of a model cannot be used.
        ModelFileError: sizes are given for a model that has a fixed one.
        DeviceUnavailable: the device is not there.
        StartupError: the gRPC port was taken, or keys and certificates were changed, meanwhile.
        RuntimeError: a device cannot be used, or the system gives no more threads.
    """
    leave = leave_on_signal(
        settings.server.drain_delay_s + settings.server.drain_grace_s + _CLOSE_S, lines.flush
    )
    raise_open_files()
    process.leave_limits_to_us()
    process.choose_kernels(settings.engine.kernels, settings.engine.cache)
    disable_created_metrics()  # a second series for each counter and histogram, read by nobody
    start = perf_counter()
    metrics = Metrics(CollectorRegistry())
    lines.on_dropped(metrics.log_lines_dropped.inc)
    devices = open_devices(
        settings.engine.device, settings.engine.threads, settings.engine.hang_timeout_s
    )
    process.compute_alone()
    of_loop = open_pool(_LOOP_THREADS, "loop")
    asyncio.get_running_loop().set_default_executor(of_loop)
    decoders = open_decoders(settings.limits, metrics)
    need_spare(sum(device.threads for device in devices))
    shared = Shared(settings, devices, decoders, metrics, tasks)
    models: list[OpenModel] = []
    catalogue = Catalogue()
    lifecycle = Lifecycle(
        lambda: all(device.healthy for device in devices),
        lambda: shared.dispatch.available and any(model.batcher.trusted for model in models),
    )
    async with (
        open_security(settings.security, metrics) as security,
        open_servers(tasks, settings, ports, catalogue, lifecycle, metrics, security) as servers,
    ):
        async with _watched(devices):
            loaded = await _unless(leave, _load(lineup, shared, models))
        if loaded:
            catalogue.fill([model.core for model in models], lineup.default)
            _let_know(lifecycle, devices, models, servers.health)
            async with asyncio.TaskGroup() as group:
                background = [group.create_task(model.batcher.run()) for model in models]
                background += [group.create_task(device.watch()) for device in devices]
                background.append(group.create_task(_measure_lag(metrics)))
                background.append(group.create_task(give_back_when_quiet()))
                process.loaded()
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
        end(0, "stopped", lines.flush, loading=True)  # nothing waits for an answer
    for pool in (of_loop, decoders.pool):
        pool.shutdown(wait=False, cancel_futures=True)
    closed = [device.close(_CLOSE_S / 4) for device in devices]
    if not all(closed) or not await_threads(_CLOSE_S / 2):
        end_stuck(lines.flush)
    log.info("stopped")


async def _load(lineup: Lineup, shared: Shared, models: list[OpenModel]) -> None:
    """Open the models in another thread, so that probes are answered meanwhile, and load them."""
    loop, pool = asyncio.get_running_loop(), shared.decoders.pool
    models += [
        await loop.run_in_executor(pool, open_model, entry, shared) for entry in lineup.models
    ]
    for model in models:
        await model.load()


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
    models: Sequence[OpenModel],
    health: Health,
) -> None:
    """Keep gRPC's health and the metrics up to date with lifecycle, devices and models."""

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


async def _stop(servers: Servers, devices: Sequence[Device], grace_s: float) -> None:
    """Wait for what is in flight; shortly before the end of the grace tell the rest to give up."""

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
