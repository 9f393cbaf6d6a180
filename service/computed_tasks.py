"""The tasks that are computed here: how the models of each are read and run.

`CONTRIBUTING.md` says how to add a task.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from model.detection.transforms import DIVISOR
from model.swin import Swin
from service.batching.batcher import Runner
from service.engine.classification import ClassificationEngine
from service.engine.computing import Computing
from service.engine.detection import DetectionEngine
from service.engine.device import Device
from service.engine.segmentation import SegmentationEngine
from service.metrics.model import ModelMetrics
from service.models.classification import CLASSIFICATION
from service.models.detection import DETECTION
from service.models.lineup import ModelEntry, ModelFileError
from service.models.load import LoadedModel, Loader
from service.models.segmentation import SEGMENTATION
from service.served_tasks import CLASSIFY, DETECT, SEGMENT, ServedTask
from service.settings.batching import Batching
from service.settings.engine import Engine as EngineSettings


class Engine(Runner, Protocol):
    """One model on one device.

    Attributes:
        max_batch: most images in one batch.
        buckets: sizes of batches that the device runs, ascending, up to that.
        dtype: of the features.
    """

    max_batch: int
    buckets: tuple[int, ...]
    dtype: torch.dtype

    async def load(self) -> Computing:
        """Make it ready for batches, and say what computes it.

        Raises:
            RuntimeError: the device cannot be used, or a graph cannot be captured.
        """

    async def unload(self) -> None:
        """Give its memory back; no batch comes any more.

        Raises:
            EngineUnavailable: the device is lost.
        """


@dataclass(frozen=True)
class EngineChoice:
    """What the settings say about the engines of one model.

    Attributes:
        entry: what the model has of its own.
        batching: of the model.
        settings: of the engines of all models.
    """

    entry: ModelEntry
    batching: Batching
    settings: EngineSettings

    @property
    def of_every_engine(self) -> dict[str, Any]:
        """What they say about the engine of any task."""
        return {
            "dtype": self.entry.dtype or self.settings.dtype,
            "max_batch": self.batching.max_batch,
            "buckets": self.batching.buckets,
        }


@dataclass(frozen=True)
class ComputedTask:
    """How the models of one task are computed.

    Attributes:
        served: what of the task needs no model.
        loader: how its models are read.
        engine: opens a model with a network of its own on one device.
    """

    served: ServedTask
    loader: Loader
    engine: Callable[[LoadedModel, Any, Device, ModelMetrics, EngineChoice], Engine]


def _classification_engine(
    model: LoadedModel,
    network: Any,
    device: Device,
    metrics: ModelMetrics,
    choice: EngineChoice,
) -> Engine:
    if choice.entry.sizes:
        raise ModelFileError(f"{model.name}: sizes are for detectors and segmenters")
    # A Swin is there to compare with: it is computed as its library does it.
    ours = not isinstance(network, Swin)
    return ClassificationEngine(
        network,
        device,
        metrics,
        **choice.of_every_engine,
        backend=choice.settings.backend if ours else "torch",
        cache=choice.settings.cache,
        compiled=choice.settings.compile and ours,
    )


def _detection_engine(
    model: LoadedModel,
    network: Any,
    device: Device,
    metrics: ModelMetrics,
    choice: EngineChoice,
) -> Engine:
    return DetectionEngine(
        network,
        device,
        metrics,
        **choice.of_every_engine,
        sizes=_ready_sizes(model, choice.batching.sizes),
    )


def _segmentation_engine(
    model: LoadedModel,  # noqa: ARG001
    network: Any,
    device: Device,
    metrics: ModelMetrics,
    choice: EngineChoice,
) -> Engine:
    return SegmentationEngine(
        network,
        device,
        metrics,
        **choice.of_every_engine,
        sizes=choice.batching.sizes,
    )


def _ready_sizes(model: LoadedModel, sizes: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """The sizes of the settings, and that of the letterbox where it is the mode of the model."""
    assert model.letterbox_size is not None, "this is a bug"
    if unpadded := [size for size in sizes if not all(map(_is_padded, size))]:
        height, width = unpadded[0]
        raise ModelFileError(
            f"{model.name}: sizes has {height}x{width}; those of a detector are padded: multiples "
            f"of {DIVISOR}, from {2 * DIVISOR} on"
        )
    square = (model.letterbox_size, model.letterbox_size)
    if model.resize_mode == "official" or square in sizes:
        return sizes
    return (square, *sizes)


def _is_padded(side: int) -> bool:
    return side % DIVISOR == 0 and side > DIVISOR


# Checkpoints are recognised in this order. A detector is recognised by its backbone, which a
# segmenter has as well.
TASKS: tuple[ComputedTask, ...] = (
    ComputedTask(SEGMENT, SEGMENTATION, _segmentation_engine),
    ComputedTask(DETECT, DETECTION, _detection_engine),
    ComputedTask(CLASSIFY, CLASSIFICATION, _classification_engine),
)
