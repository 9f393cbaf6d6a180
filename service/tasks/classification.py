"""The core of classification: the classes of an image, best first."""

from dataclasses import dataclass

import numpy as np

from model.transforms import Preprocessing
from service.batching.batcher import Batcher, Served
from service.engine.classification import EngineInput, EngineOutput
from service.errors import EngineFailed, InvalidOption
from service.images.decode import PreparedImage, prepare
from service.images.decoders import Decoders
from service.metrics import ModelMetrics
from service.models.load import ModelCard, ServedModel
from service.settings import Limits
from service.tasks.core import Answer, Core, Options, Timing
from service.tasks.points import LayerPoints, point_layers


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(Options):
    """What a request for classes may ask for.

    Attributes:
        top_k: predictions for each image, best first; at most all classes are given.
    """

    top_k: int = 5


@dataclass(frozen=True)
class Prediction:
    """A class with its softmax probability, and its WordNet id where it has one."""

    label: str
    index: int
    score: float
    wnid: str | None


@dataclass(frozen=True, kw_only=True)
class Classification(Answer):
    """The classes of one image.

    Attributes:
        predictions: best first.
        points: one entry for each deformable layer, or `None` when not asked for.
    """

    predictions: tuple[Prediction, ...]
    points: tuple[LayerPoints, ...] | None


class Classifier(Core[ClassifyOptions, PreparedImage, EngineInput, EngineOutput, Classification]):
    """Classifies requests of one model."""

    def __init__(
        self,
        served: ServedModel,
        card: ModelCard,
        batcher: Batcher[EngineInput, EngineOutput],
        *,
        decoders: Decoders,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        super().__init__(
            card, served.labels, batcher, decoders=decoders, limits=limits, metrics=metrics
        )
        self._preprocessing = Preprocessing.of(served.network.config)
        self._layers = point_layers(served.network)

    def check(self, options: ClassifyOptions) -> None:  # noqa: D102
        if options.top_k < 1:
            raise InvalidOption(f"top_k must be at least 1, not {options.top_k}")
        if options.explain == "objects":
            raise InvalidOption("explain=objects is for detectors")

    def prepare(self, upload: bytes, _: ClassifyOptions) -> PreparedImage:  # noqa: D102
        return prepare(upload, self._limits, self._preprocessing)

    def item(self, prepared: PreparedImage, options: ClassifyOptions) -> EngineInput:  # noqa: D102
        return EngineInput(prepared.pixels, options.explain == "points")

    async def finish(  # noqa: D102
        self,
        prepared: PreparedImage,
        served: Served[EngineOutput],
        options: ClassifyOptions,
        timing: Timing,
    ) -> Classification:
        scores = served.result.scores
        if not np.isfinite(scores).all():
            raise EngineFailed("the model gave no number for this image")
        classes = served.result.classes[: options.top_k]
        best = zip(classes.tolist(), scores[: options.top_k].tolist(), strict=True)
        points = None
        if options.explain == "points":
            points = tuple(
                layer.points(locations, prepared.pixel_map)
                for layer, locations in zip(
                    self._layers, served.result.sampling_locations, strict=True
                )
            )
        return Classification(
            width=prepared.width,
            height=prepared.height,
            timing=timing,
            predictions=tuple(self._prediction(index, score) for index, score in best),
            points=points,
        )

    def _prediction(self, index: int, score: float) -> Prediction:
        label = self.labels[index]
        return Prediction(label.name, index, score, label.wnid)
