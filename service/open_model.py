"""One model of a replica: weights, engine, batcher and core, put together."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import structlog

from model import kernels
from service import served_model
from service.batcher import Batcher
from service.classifier import Classifier
from service.core import Core
from service.detector import DetectorCore
from service.engine.detection import DetectionEngine, DetectionInput, DetectionOutput
from service.engine.device import Device
from service.engine.engine import Engine, EngineInput, EngineOutput
from service.metrics import Metrics, ModelMetrics
from service.model_file import ModelEntry, ModelFileError
from service.served_model import ModelCard, ServedDetector, ServedModel
from service.settings import Batching, Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model from its weights to its core; `engine.load` and `batcher.run` make it work."""

    core: Core[Any, Any, Any, Any, Any]
    batcher: Batcher[Any, Any]
    engine: Engine | DetectionEngine
    metrics: ModelMetrics
    source: Path


@dataclass(frozen=True)
class Shared:
    """What the models of a replica have in common."""

    settings: Settings
    device: Device
    workers: ThreadPoolExecutor
    metrics: Metrics


def open_model(entry: ModelEntry, shared: Shared) -> OpenModel:
    """Read a model, and put the engine, the batcher and the core over it.

    Raises:
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
        ModelFileError: sizes for a model that has a fixed one.
    """
    kernels.enabled = shared.settings.engine.kernels
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
    device = shared.device
    metrics = shared.metrics.add_model(
        served.name, served.version, "classify", batching.queue_limit
    )
    engine = Engine(
        served.network,
        device,
        metrics,
        dtype=entry.dtype or shared.settings.engine.dtype,
        max_batch=batching.max_batch,
        buckets=batching.buckets,
    )
    batcher = Batcher[EngineInput, EngineOutput](
        engine.run_batch,
        max_batch=engine.max_batch,
        queue_limit=batching.queue_limit,
        metrics=metrics,
        turn=device.turn,
    )
    card = ModelCard.of(
        served,
        device=str(device.torch_device),
        dtype=str(engine.dtype).removeprefix("torch."),
        max_batch=engine.max_batch,
    )
    core = Classifier(
        served,
        card,
        batcher,
        workers=shared.workers,
        limits=shared.settings.limits,
        metrics=metrics,
    )
    return OpenModel(core, batcher, engine, metrics, served.source)


def _open_detector(
    served: ServedDetector, entry: ModelEntry, batching: Batching, shared: Shared
) -> OpenModel:
    device = shared.device
    metrics = shared.metrics.add_model(served.name, served.version, "detect", batching.queue_limit)
    engine = DetectionEngine(
        served.detector,
        device,
        metrics,
        dtype=entry.dtype or shared.settings.engine.dtype,
        max_batch=batching.max_batch,
        buckets=batching.buckets,
        sizes=_ready_sizes(served, batching),
    )
    batcher = Batcher[DetectionInput, DetectionOutput](
        engine.run_batch,
        max_batch=engine.max_batch,
        queue_limit=batching.queue_limit,
        metrics=metrics,
        turn=device.turn,
        group=lambda item: item.padded_size,
    )
    card = ModelCard.of_detector(
        served,
        device=str(device.torch_device),
        dtype=str(engine.dtype).removeprefix("torch."),
        max_batch=engine.max_batch,
    )
    core = DetectorCore(
        served,
        card,
        batcher,
        workers=shared.workers,
        limits=shared.settings.limits,
        metrics=metrics,
    )
    return OpenModel(core, batcher, engine, metrics, served.source)


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
