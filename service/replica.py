"""One replica: opens the engines, the batchers, the core and the servers, and drains them.

The only module that sees all others.
"""

import asyncio
import signal
from time import perf_counter

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics

from service.catalogue import Catalogue
from service.engine.device import compute_alone, open_devices
from service.lifecycle import Lifecycle
from service.machine import raise_open_files
from service.memory import give_back_when_quiet, keep_freed
from service.metrics import Metrics
from service.model_file import Lineup, choose_models
from service.open_model import OpenModel, Shared, open_model, open_workers
from service.ports import Ports
from service.servers import open_servers
from service.settings import Settings

log = structlog.get_logger(__name__)

_LAG_PERIOD_S = 0.5


async def serve(settings: Settings, ports: Ports) -> None:
    """Run a replica until SIGTERM or SIGINT, then drain it.

    Args:
        settings: all of them.
        ports: already open.

    Raises:
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
        ModelFileError: the model file cannot be used.
        DeviceUnavailable: the device is not there.
        StartupError: the gRPC port was taken meanwhile.
    """
    leave = _leave_on_signal()
    raise_open_files()
    disable_created_metrics()  # a second series for each counter and histogram, read by nobody
    start = perf_counter()
    lineup = choose_models(settings)
    metrics = Metrics(CollectorRegistry())
    devices = open_devices(settings.engine.device, settings.engine.threads)
    compute_alone()
    lifecycle = Lifecycle(lambda: all(device.healthy for device in devices))
    catalogue = Catalogue()
    with open_workers(settings.limits.decoders) as workers:
        async with open_servers(settings, ports, catalogue, lifecycle, metrics) as servers:
            models = await _read(lineup, Shared(settings, devices, workers, metrics))
            catalogue.fill([model.core for model in models], lineup.default)
            async with asyncio.TaskGroup() as tasks:
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


async def _read(lineup: Lineup, shared: Shared) -> list[OpenModel]:
    """Open the models in another thread, so that probes are answered meanwhile."""
    loop = asyncio.get_running_loop()
    return [
        await loop.run_in_executor(shared.workers, open_model, entry, shared)
        for entry in lineup.models
    ]


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
