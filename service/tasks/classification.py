"""Classification: the classes of an image, best first."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from model.config import DatConfig
from model.transforms import Preprocessing
from service.batching.queue import Queue
from service.engine.items import Cells, ClassificationInput, ClassificationOutput, Wanted
from service.errors import EngineFailed, InvalidOption
from service.images.decode import prepare
from service.images.decoders import Decoders
from service.metrics.model import ModelMetrics
from service.models.card import Label, ModelCard
from service.settings.limits import Limits
from service.tasks import attention
from service.tasks.attention import Seen
from service.tasks.core import Answer, Options
from service.tasks.drawing import Drawing, Shown
from service.tasks.passage import ImagePassage
from service.tasks.pictures import PicturedCore, PictureOptions
from service.tasks.points import explained


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(Options):
    """What a request for classes may ask for.

    Attributes:
        top_k: predictions for each image, best first; at most all classes are given.
        logits: whether they are wanted.
    """

    top_k: int = 5
    logits: bool = False


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
        scores: softmax probabilities `(num_classes,)` of all classes, best first.
        classes: `(num_classes,)`, the class of each score.
        logits: `(num_classes,)`, of each class in turn; `None` when not asked for.
    """

    predictions: tuple[Prediction, ...]
    scores: NDArray[np.float32]
    classes: NDArray[np.int32]
    logits: NDArray[np.float32] | None


class ClassificationCore(PicturedCore[ClassifyOptions, Classification]):
    """Classifies requests of one model."""

    def __init__(
        self,
        config: attention.Config,
        card: ModelCard,
        labels: tuple[Label, ...],
        queue: Queue,
        *,
        decoders: Decoders,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        super().__init__(card, labels, queue, decoders=decoders, limits=limits, metrics=metrics)
        self._config = config
        self._preprocessing = Preprocessing.of(config)

    @property
    @override
    def network(self) -> attention.Config:
        return self._config

    @property
    @override
    def shown(self) -> tuple[Shown, ...]:
        return ("points", "arrows")

    @override
    def pictured(
        self, asked: PictureOptions, drawing: Drawing, every_task: dict[str, Any]
    ) -> ClassifyOptions:
        name = self.card.name
        if objects := [one for one in drawing.show if one in ("boxes", "masks", "segments")]:
            other = "segmenter" if objects[0] == "segments" else "detector"
            raise InvalidOption(
                f"{name} is a classifier, which finds no {objects[0]}; show points, attention, "
                f"arrows or keys, or name a {other}"
            )
        if asked.score_threshold is not None or asked.classes or asked.resize_mode is not None:
            raise InvalidOption(
                "score_threshold, classes and resize_mode are for detectors; "
                f"{name} is a classifier"
            )
        return ClassifyOptions(**every_task, top_k=1)

    @override
    def check(self, options: ClassifyOptions) -> None:
        if options.top_k < 1:
            raise InvalidOption(f"top_k must be at least 1, not {options.top_k}")
        if options.explain == "objects":
            raise InvalidOption("explain=objects is for detectors")
        if options.explain == "points" and not attention.has_points(self._config):
            raise InvalidOption(
                f"{self.card.name} has no sampling points; explain=attention shows what its "
                "windows attend to"
            )
        name = self.card.name
        attention.check(options.attention, self._config, asked=options.attends, model=name)

    @override
    async def answer_image(self, passage: ImagePassage, options: ClassifyOptions) -> Classification:
        image = await passage.decode(
            lambda data, empty: prepare(data, self._limits, self._preprocessing, empty)
        )
        wanted = Wanted(points=options.explain != "none", logits=options.logits)
        cells: Cells = ()
        size = self._config.image_size
        seen = Seen(self._config, size, size, (image.height, image.width), image.pixel_map)
        if options.attends:
            looks, cells = attention.wanted(options.attention, seen)
            wanted = replace(looks, logits=options.logits)
        output: ClassificationOutput
        output, timing = await passage.submit(ClassificationInput(image.pixels, wanted, cells))
        given = (output.scores,) if output.logits is None else (output.scores, output.logits)
        if not all(np.isfinite(values).all() for values in given):
            raise EngineFailed("the model gave values that are not numbers for this image")
        best = zip(
            output.classes[: options.top_k].tolist(),
            output.scores[: options.top_k].tolist(),
            strict=True,
        )
        points = attended = None
        if wanted.points and isinstance(self._config, DatConfig):
            points = explained(self._config, size, output.sampling_locations, image.pixel_map)
        if wanted.attention:
            attended = attention.explained(options.attention, seen, output.attention, points or ())
        return Classification(
            width=image.width,
            height=image.height,
            timing=timing,
            predictions=tuple(self._prediction(index, score) for index, score in best),
            scores=output.scores,
            classes=output.classes,
            logits=output.logits,
            points=points,
            attention=attended,
        )

    def _prediction(self, index: int, score: float) -> Prediction:
        label = self.labels[index]
        return Prediction(label.name, index, score, label.wnid)
