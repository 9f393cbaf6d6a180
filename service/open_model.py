"""One model of a replica: weights, engines, batcher and core, put together."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import structlog
from torch import nn

from model import kernels
from service.batching.batcher import Batcher
from service.batching.dispatch import Dispatch
from service.engine.classification import Engine, EngineInput, EngineOutput
from service.engine.detection import DetectionEngine, DetectionInput, DetectionOutput
from service.engine.device import Device, compute_alone
from service.images.decoders import Decoders
from service.memory import reach_heap
from service.metrics import Metrics, ModelMetrics
from service.models import load as served_model
from service.models.lineup import ModelEntry, ModelFileError
from service.models.load import ModelCard, ServedDetector, ServedModel
from service.settings import Batching, Limits, Settings, keep_compiled
from service.tasks.classification import Classifier
from service.tasks.core import Core
from service.tasks.detection import DetectorCore
from service.threads import open_pool

log = structlog.get_logger(__name__)

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class OpenModel:
    """A model from its weights to its core; `load` and `batcher.run` make it work."""

    core: Core[Any, Any, Any, Any, Any]
    batcher: Batcher[Any, Any]
    engines: Sequence[Engine | DetectionEngine]
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
            log.info("computes", model=self.core.card.name, **computing.log_fields())


def open_workers(threads: int) -> ThreadPoolExecutor:
    """Threads that decode uploads and prepare answers, each for itself.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def begin() -> None:
        compute_alone()
        reach_heap()

    return open_pool(threads, "decode", begin)


def open_decoders(limits: Limits, metrics: Metrics) -> Decoders:
    """Those threads, and the line before them.

    Raises:
        RuntimeError: the system gives no more threads.
    """
    pool = open_workers(limits.decoders)
    return Decoders(pool, limits.pixels_in_flight, metrics.pixels_in_flight)


@dataclass(frozen=True)
class Shared:
    """What the models of a replica have in common."""

    settings: Settings
    devices: Sequence[Device]
    decoders: Decoders
    metrics: Metrics

    @cached_property
    def dispatch(self) -> Dispatch:
        """Of the batches of all models."""
        return Dispatch(self.devices)

    @property
    def device_names(self) -> list[str]:
        """Those of the devices, in the order of the dispatch."""
        return [device.name for device in self.devices]


def open_model(entry: ModelEntry, shared: Shared) -> OpenModel:
    """Read a model, and put the engines, the batcher and the core over it.

    Raises:
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
        ModelFileError: sizes for a model that has a fixed one.
        DeviceUnavailable: a setting that the device cannot follow.
    """
    kernels.enabled = shared.settings.engine.kernels
    if shared.settings.engine.cache is not None:
        keep_compiled(shared.settings.engine.cache)
    start = perf_counter()
    served = served_model.load(entry)
    read_s = perf_counter() - start
    batching = entry.batching(shared.settings.batching)
    opened = (
        _open_detector(served, entry, batching, shared)
        if isinstance(served, ServedDetector)
        else _open_classifier(served, entry, batching, shared)
    )
    opened.metrics.load_seconds["read"].set(read_s)
    _log(opened.core.card, served.source)
    return opened


def _open_classifier(
    served: ServedModel, entry: ModelEntry, batching: Batching, shared: Shared
) -> OpenModel:
    if entry.sizes:
        raise ModelFileError(f"{served.name}: sizes are for detectors")
    metrics = shared.metrics.add_model(
        served.name, served.version, "classify", batching.queue_limit, shared.device_names
    )
    engines = [
        Engine(
            network,
            device,
            metrics,
            dtype=entry.dtype or shared.settings.engine.dtype,
            max_batch=batching.max_batch,
            buckets=batching.buckets,
            backend=shared.settings.engine.backend,
            cache=shared.settings.engine.cache,
            compiled=shared.settings.engine.compile,
        )
        for device, network in _on_each(shared.devices, served.network)
    ]
    batcher = Batcher[EngineInput, EngineOutput](
        engines,
        max_batch=engines[0].max_batch,
        queue_limit=batching.queue_limit,
        metrics=metrics,
        dispatch=shared.dispatch,
        goes_ahead=_goes_ahead(shared.devices, engines[0].max_batch),
    )
    card = ModelCard.of(
        served,
        device=",".join(str(device.torch_device) for device in shared.devices),
        dtype=str(engines[0].dtype).removeprefix("torch."),
        max_batch=engines[0].max_batch,
    )
    core = Classifier(
        served,
        card,
        batcher,
        decoders=shared.decoders,
        limits=shared.settings.limits,
        metrics=metrics,
    )
    return OpenModel(core, batcher, engines, metrics, served.source)


def _open_detector(
    served: ServedDetector, entry: ModelEntry, batching: Batching, shared: Shared
) -> OpenModel:
    metrics = shared.metrics.add_model(
        served.name, served.version, "detect", batching.queue_limit, shared.device_names
    )
    engines = [
        DetectionEngine(
            detector,
            device,
            metrics,
            dtype=entry.dtype or shared.settings.engine.dtype,
            max_batch=batching.max_batch,
            buckets=batching.buckets,
            sizes=_ready_sizes(served, batching),
        )
        for device, detector in _on_each(shared.devices, served.detector)
    ]
    batcher = Batcher[DetectionInput, DetectionOutput](
        engines,
        max_batch=engines[0].max_batch,
        queue_limit=batching.queue_limit,
        metrics=metrics,
        dispatch=shared.dispatch,
        goes_ahead=_goes_ahead(shared.devices, engines[0].max_batch),
        group=lambda item: item.padded_size,
    )
    card = ModelCard.of_detector(
        served,
        device=",".join(str(device.torch_device) for device in shared.devices),
        dtype=str(engines[0].dtype).removeprefix("torch."),
        max_batch=engines[0].max_batch,
    )
    core = DetectorCore(
        served,
        card,
        batcher,
        decoders=shared.decoders,
        limits=shared.settings.limits,
        metrics=metrics,
    )
    return OpenModel(core, batcher, engines, metrics, served.source)


def _on_each(devices: Sequence[Device], network: Network) -> Iterator[tuple[Device, Network]]:
    """Each device with a network of its own."""
    for index, device in enumerate(devices):
        yield device, deepcopy(network) if index else network


def _goes_ahead(devices: Sequence[Device], max_batch: int) -> bool:
    """Whether a full batch leaves the queue before its device is free.

    Single images are always full batches. On a CPU they take long, and one that its caller no
    longer wants is best found in the queue.
    """
    return max_batch > 1 or devices[0].torch_device.type == "cuda"


def _ready_sizes(served: ServedDetector, batching: Batching) -> tuple[tuple[int, int], ...]:
    """Those of the settings, and that of the letterbox where every image comes in one."""
    square = (served.letterbox_size, served.letterbox_size)
    if served.resize_mode == "official" or square in batching.sizes:
        return batching.sizes
    return (square, *batching.sizes)


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
        source=str(source),
        classes=card.classes,
        parameters=f"{card.parameters / 1e6:.1f} M",
        device=card.device,
        dtype=card.dtype,
        max_batch=card.max_batch,
        **per_image,
    )
