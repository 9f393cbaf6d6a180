"""One model of a replica: weights, engine, batcher and core, put together."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import structlog

from service import served_model
from service.batcher import Batcher
from service.classifier import Classifier
from service.engine.device import Device
from service.engine.engine import Engine, EngineInput, EngineOutput
from service.metrics import Metrics, ModelMetrics
from service.model_file import ModelEntry
from service.served_model import ModelCard
from service.settings import Settings

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class OpenModel:
    """A model from its weights to its core; `engine.load` and `batcher.run` make it work."""

    core: Classifier
    batcher: Batcher[EngineInput, EngineOutput]
    engine: Engine
    metrics: ModelMetrics
    source: Path


def open_model(
    entry: ModelEntry,
    settings: Settings,
    device: Device,
    workers: ThreadPoolExecutor,
    metrics: Metrics,
) -> OpenModel:
    """Read a model, and put the engine, the batcher and the core over it.

    Raises:
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
    """
    start = perf_counter()
    served = served_model.load(entry)
    batching = entry.batching(settings.batching)
    own = metrics.add_model(served.name, served.version, "classify", batching.queue_limit)
    own.load_seconds["read"].set(perf_counter() - start)
    engine = Engine(
        served.network,
        device,
        own,
        dtype=entry.dtype or settings.engine.dtype,
        max_batch=batching.max_batch,
        buckets=batching.buckets,
    )
    batcher = Batcher[EngineInput, EngineOutput](
        engine.run_batch,
        max_batch=engine.max_batch,
        queue_limit=batching.queue_limit,
        metrics=own,
        turn=device.turn,
    )
    card = ModelCard.of(
        served,
        device=str(device.torch_device),
        dtype=str(engine.dtype).removeprefix("torch."),
        max_batch=engine.max_batch,
    )
    log.info(
        "model",
        name=card.name,
        version=card.version,
        variant=card.variant,
        source=str(served.source),
        image_size="{}x{}".format(*card.image_size),
        classes=card.classes,
        parameters=f"{card.parameters / 1e6:.1f} M",
        flops=f"{card.flops / 1e9:.2f} G",
        device=card.device,
        dtype=card.dtype,
        max_batch=card.max_batch,
    )
    core = Classifier(served, card, batcher, workers=workers, limits=settings.limits, metrics=own)
    return OpenModel(core, batcher, engine, own, served.source)
