"""One model on its devices: weights, engines and batcher, put together."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog
from torch import nn

from model.checkpoint import CheckpointError
from service.batching.admission import LocalPlaces, Places
from service.batching.batcher import Batcher
from service.batching.dispatch import Dispatch
from service.batching.forecast import Forecast
from service.command_errors import StartupError
from service.computed_tasks import TASKS, ComputedTask, Engine, EngineChoice
from service.engine.device import Device
from service.errors import EngineUnavailable
from service.memory import reach_heap
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from service.models.card import ModelCard, ModelFacts
from service.models.lineup import ModelEntry
from service.models.load import LoadedModel, load
from service.served_tasks import ServedTask
from service.settings.settings import Settings
from service.threads import open_pool

log = structlog.get_logger(__name__)


class ModelUnusable(StartupError):
    """The weights or the class names of a model cannot be used."""


@dataclass(frozen=True)
class OpenModel:
    """A model from its weights to its queue; `load` and `batcher.run` make it work."""

    facts: ModelFacts
    batcher: Batcher[Any, Any]
    engines: Sequence[Engine]
    metrics: ModelMetrics
    source: Path

    async def load(self) -> None:
        """Load every engine on its device, one after the other: torch exports and traces alone.

        Raises:
            RuntimeError: a device cannot be used, or a graph cannot be captured.
        """
        for engine in self.engines:
            computing = await engine.load()
            computing.show(self.metrics)
            log.info("computes", model=self.facts.card.name, **computing.log_fields())

    async def close(self) -> None:
        """Give the memory of the engines back, once no batch is run any more."""
        self.batcher.close()
        for engine in self.engines:
            with suppress(EngineUnavailable):  # its device is lost, and its memory with it
                await engine.unload()


@dataclass(frozen=True)
class Shared:
    """What the models on some devices have in common."""

    settings: Settings
    devices: Sequence[Device]
    metrics: Metrics
    tasks: Sequence[ComputedTask] = TASKS

    @cached_property
    def dispatch(self) -> Dispatch:
        """What gives out the places on the devices, to the batches of all models."""
        return Dispatch(self.devices)

    @cached_property
    def reader(self) -> ThreadPoolExecutor:
        """The thread that reads new versions: always the same, whose free memory is given back."""
        return open_pool(1, "reader", reach_heap)

    @property
    def served(self) -> list[ServedTask]:
        """What the tasks ask and answer."""
        return [task.served for task in self.tasks]

    @property
    def device_names(self) -> list[str]:
        """The names of the devices, in the order of the dispatch."""
        return [device.name for device in self.devices]


def open_model(
    entry: ModelEntry,
    shared: Shared,
    places: Callable[[int], Places] = LocalPlaces,
    forecast: Forecast | None = None,
) -> OpenModel:
    """Read a model, and put the engines and the batcher over it.

    Args:
        entry: which model.
        shared: what it shares with others.
        places: in its queue, from how many there are.
        forecast: learns from its batches.

    Raises:
        ModelUnusable: the weights or the class names cannot be used.
        ModelFileError: sizes are given for a model that has a fixed one.
        DeviceUnavailable: a setting that the device cannot follow.
    """
    settings, devices = shared.settings, shared.devices
    start = perf_counter()
    try:
        loaded = load(entry, [task.loader for task in shared.tasks])
    except CheckpointError as fault:
        raise ModelUnusable(str(fault)) from fault
    read_s = perf_counter() - start
    task = next(task for task in shared.tasks if task.served.name == loaded.task)
    batching = entry.batching(settings.batching)
    metrics = shared.metrics.add_model(
        loaded.name,
        loaded.version,
        loaded.task,
        batching.queue_limit,
        [device.name for device in devices],
    )
    metrics.load_seconds["read"].set(read_s)
    choice = EngineChoice(entry, batching, settings.engine)
    engines = [
        task.engine(loaded, network, device, metrics, choice)
        for device, network in _on_each(devices, loaded)
    ]
    max_batch = engines[0].max_batch
    batcher = Batcher[Any, Any](
        engines,
        max_batch=max_batch,
        places=places(batching.queue_limit),
        metrics=metrics,
        dispatch=shared.dispatch,
        group=attrgetter("group"),
        goes_ahead=_goes_ahead(devices, max_batch),
        forecast=forecast,
    )
    card = loaded.card(
        device=",".join(str(device.torch_device) for device in devices),
        dtype=str(engines[0].dtype).removeprefix("torch."),
        max_batch=max_batch,
        buckets=tuple(engines[0].buckets),
    )
    facts = ModelFacts(loaded.config, card, loaded.labels, batching.queue_limit)
    _log(card, loaded.source)
    return OpenModel(facts, batcher, engines, metrics, loaded.source)


def _on_each(devices: Sequence[Device], loaded: LoadedModel) -> Iterator[tuple[Device, nn.Module]]:
    """Each device with a network of its own."""
    for index, device in enumerate(devices):
        yield device, deepcopy(loaded.network) if index else loaded.network


def _goes_ahead(devices: Sequence[Device], max_batch: int) -> bool:
    """Whether a full batch leaves the queue before its device is free.

    Single images are always full batches. On a CPU they take long, and one that its caller no
    longer wants is best found in the queue.
    """
    return max_batch > 1 or devices[0].torch_device.type == "cuda"


def _log(card: ModelCard, source: Path) -> None:
    per_image = {}
    if card.image_size is not None and card.flops is not None:
        height, width = card.image_size
        per_image = {"image_size": f"{height}x{width}", "flops": f"{card.flops / 1e9:.2f} G"}
    log.info(
        "model",
        name=card.name,
        version=card.version,
        task=card.task,
        variant=card.variant,
        source=str(source.resolve()),
        classes=card.classes,
        parameters=f"{card.parameters / 1e6:.1f} M",
        device=card.device,
        dtype=card.dtype,
        max_batch=card.max_batch,
        **per_image,
    )
