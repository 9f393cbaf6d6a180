"""Detection: the objects in an image, best first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from model.config import DatConfig
from model.detection.config import MOST_DETECTIONS, SCORE_THRESHOLD, DetectorConfig
from model.detection.masks import paste
from model.detection.transforms import Resizing, to_model_pixels
from service.batching.queue import Queue
from service.engine.items import DetectionInput, DetectionOutput
from service.errors import EngineFailed, InvalidImage, InvalidOption, quoted
from service.images.decode import Empty, Source, decode_pixels
from service.images.decoders import Decoders
from service.metrics.model import ModelMetrics
from service.models.card import Label, ModelCard
from service.pictures.compose import Thing
from service.settings.limits import Limits
from service.settings.model import ResizeMode
from service.tasks import attention, explanation
from service.tasks.attention import Seen
from service.tasks.core import Answer, Options
from service.tasks.drawing import Drawing, Shown
from service.tasks.masks import EncodedMask, Mask, MaskFormat, Polygons, encode
from service.tasks.passage import ImagePassage, Timing
from service.tasks.pictures import PICTURED_SCORE, PicturedCore, PictureOptions
from service.tasks.points import LayerPoints


@dataclass(frozen=True, kw_only=True)
class DetectOptions(Options):
    """What a request for objects may ask for.

    Attributes:
        score_threshold: least score of a detection; detectors keep none below `SCORE_THRESHOLD`.
        max_detections: most detections in an image, best first.
        classes: names of the classes that are wanted; empty means all.
        masks: form of the masks; `None` means `rle` where the model has masks.
        resize_mode: how the images are resized; `None` means as the model's settings say.
    """

    score_threshold: float = SCORE_THRESHOLD
    max_detections: int = MOST_DETECTIONS
    classes: tuple[str, ...] = ()
    masks: MaskFormat | Literal["none"] | None = None
    resize_mode: ResizeMode | None = None


@dataclass(frozen=True)
class PointsInside:
    """Which points of one deformable layer lie inside an object.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        indices: into the points `(G, Hk, Wk)` of the layer, row-major.
    """

    stage: int
    block: int
    indices: NDArray[np.int64]


@dataclass(frozen=True)
class Detection:
    """One object.

    Attributes:
        label: its class.
        index: of the class.
        score: from 0 to 1.
        box: `(x1, y1, x2, y2)` in pixels of the uploaded image after its EXIF orientation.
        mask: its pixels, or `None` when not asked for.
        points_inside: for each deformable layer, or `None` when not asked for.
    """

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]
    mask: EncodedMask | None
    points_inside: tuple[PointsInside, ...] | None


@dataclass(frozen=True, kw_only=True)
class DetectedImage(Answer):
    """The objects of one image.

    Attributes:
        detections: best first.
        input_size: `(H, W)` that the detector saw, without padding, pixels.
        resize_mode: how the image was resized to that.
    """

    detections: tuple[Detection, ...]
    input_size: tuple[int, int]
    resize_mode: ResizeMode


@dataclass(frozen=True)
class PreparedForDetection:
    """One image, ready for the detector."""

    pixels: NDArray[np.uint8]
    resizing: Resizing
    resize_mode: ResizeMode


class DetectionCore(PicturedCore[DetectOptions, DetectedImage]):
    """Answers requests of one detector."""

    def __init__(
        self,
        config: DetectorConfig,
        card: ModelCard,
        labels: tuple[Label, ...],
        queue: Queue,
        *,
        decoders: Decoders,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        super().__init__(card, labels, queue, decoders=decoders, limits=limits, metrics=metrics)
        assert card.resize_mode is not None, "this is a bug"
        assert card.letterbox_size is not None, "this is a bug"
        self._config = config
        self._resize_mode = card.resize_mode
        self._letterbox_size = card.letterbox_size
        self._names = {label.name for label in labels}

    @property
    def has_masks(self) -> bool:
        """Whether the model finds the pixels of an object, beside its box."""
        return self._config.has_masks

    @property
    @override
    def network(self) -> DatConfig:
        return self._config.backbone

    @property
    @override
    def shown(self) -> tuple[Shown, ...]:
        return ("points", "boxes", "masks") if self.has_masks else ("points", "boxes")

    @override
    def pictured(
        self, asked: PictureOptions, drawing: Drawing, every_task: dict[str, Any]
    ) -> DetectOptions:
        if "segments" in drawing.show:
            raise InvalidOption(
                f"{self.card.name} is a detector, which finds no segments; show boxes, masks, "
                "points, attention, arrows or keys, or name a segmenter"
            )
        score = asked.score_threshold
        return DetectOptions(
            **every_task,
            score_threshold=PICTURED_SCORE if score is None else score,
            classes=asked.classes,
            masks="polygon" if "masks" in drawing.show else "none",
            resize_mode=asked.resize_mode,
        )

    @override
    def things(self, answer: DetectedImage) -> Sequence[Thing]:
        return [
            Thing(
                found.label,
                found.score,
                found.index,
                found.box,
                found.mask.rings if isinstance(found.mask, Polygons) else (),
            )
            for found in answer.detections
        ]

    @override
    def check(self, options: DetectOptions) -> None:
        if not 0 <= options.score_threshold <= 1:
            raise InvalidOption(
                f"score_threshold must be from 0 to 1, not {options.score_threshold}"
            )
        if not 1 <= options.max_detections <= MOST_DETECTIONS:
            raise InvalidOption(
                f"max_detections must be from 1 to {MOST_DETECTIONS}, not {options.max_detections}"
            )
        if unknown := [name for name in options.classes if name not in self._names]:
            raise InvalidOption(f"{self.card.name} has no class {quoted(unknown[0])}")
        if options.masks not in (None, "none") and not self.has_masks:
            raise InvalidOption(f"{self.card.name} gives no masks")
        backbone, name = self._config.backbone, self.card.name
        attention.check(options.attention, backbone, asked=options.attends, model=name)

    @override
    async def answer_image(self, passage: ImagePassage, options: DetectOptions) -> DetectedImage:
        image = await passage.decode(lambda data, empty: self._prepare(data, options, empty))
        resizing = image.resizing
        wanted, cells = explanation.ask(options, self._seen(resizing))
        item = DetectionInput(image.pixels, resizing.resized, resizing.scale_xy, wanted, cells)
        output: DetectionOutput
        output, timing = await passage.submit(item)
        # Pasting a hundred masks takes tens of milliseconds.
        return await self._decoders.run_now(lambda: self._answer(image, output, options, timing))

    def _seen(self, resizing: Resizing) -> Seen:
        return Seen(
            self._config.backbone,
            resizing.padded,
            resizing.resized,
            resizing.image_size,
            resizing,
        )

    def _prepare(
        self, upload: Source, options: DetectOptions, empty: Empty
    ) -> PreparedForDetection:
        image = decode_pixels(upload, self._limits)
        resize_mode = options.resize_mode or self._resize_mode
        height, width, _ = image.shape
        image_size = (height, width)
        resizing = (
            Resizing.letterbox(image_size, self._letterbox_size)
            if resize_mode == "letterbox"
            else self._config.resizing(image_size)
        )
        if not resizing.fits:
            raise InvalidImage(
                "unsupported",
                f"an image of {width}x{height} pixels is too long and narrow to be "
                f"resized to {resizing.resized[1]}x{resizing.resized[0]}",
            )
        out = empty((*resizing.padded, 3))
        pixels = to_model_pixels(image, resizing, out)
        return PreparedForDetection(pixels, resizing, resize_mode)

    def _answer(
        self,
        prepared: PreparedForDetection,
        output: DetectionOutput,
        options: DetectOptions,
        timing: Timing,
    ) -> DetectedImage:
        if not (np.isfinite(output.scores).all() and np.isfinite(output.boxes).all()):
            raise EngineFailed("the model gave values that are not numbers for this image")
        resizing = prepared.resizing
        height, width = resizing.image_size
        told = explanation.tell(options, self._seen(resizing), output)
        wanted = self._wanted(output, options)
        masks = self._masks(output, wanted, resizing.image_size, options)
        return DetectedImage(
            width=width,
            height=height,
            timing=timing,
            detections=tuple(
                self._detection(output, int(row), mask, told.points, options)
                for row, mask in zip(wanted, masks, strict=True)
            ),
            points=told.points,
            attention=told.attention,
            input_size=resizing.resized,
            resize_mode=prepared.resize_mode,
        )

    def _wanted(self, output: DetectionOutput, options: DetectOptions) -> NDArray[np.int64]:
        keep = output.scores >= options.score_threshold
        if options.classes:
            wanted = [i for i, label in enumerate(self.labels) if label.name in options.classes]
            keep &= np.isin(output.classes, wanted)
        rows: NDArray[np.int64] = np.flatnonzero(keep)
        return rows[: options.max_detections]

    def _masks(
        self,
        output: DetectionOutput,
        rows: NDArray[np.int64],
        image_size: tuple[int, int],
        options: DetectOptions,
    ) -> list[Mask | None]:
        probabilities = output.mask_probabilities
        inside = options.explain == "objects"
        if probabilities is None or (options.masks == "none" and not inside):
            return [None] * len(rows)
        return [
            Mask(pasted.top, pasted.left, pasted.pixels, image_size)
            for pasted in paste(probabilities[rows], output.boxes[rows], image_size)
        ]

    def _detection(
        self,
        output: DetectionOutput,
        row: int,
        mask: Mask | None,
        points: tuple[LayerPoints, ...] | None,
        options: DetectOptions,
    ) -> Detection:
        index = int(output.classes[row])
        x1, y1, x2, y2 = output.boxes[row].tolist()
        inside = None
        if points is not None and options.explain == "objects":
            inside = tuple(
                PointsInside(
                    layer.stage,
                    layer.block,
                    _indices_inside(layer.sampling_locations, (x1, y1, x2, y2), mask),
                )
                for layer in points
            )
        encoded = None
        if mask is not None and options.masks != "none":
            encoded = encode(mask, options.masks or "rle")
        return Detection(
            self.labels[index].name,
            index,
            float(output.scores[row]),
            (x1, y1, x2, y2),
            encoded,
            inside,
        )


def _indices_inside(
    points_xy: NDArray[np.float32], box: tuple[float, float, float, float], mask: Mask | None
) -> NDArray[np.int64]:
    """Which points `(G, Hk, Wk, 2)` lie in a mask, or in a box where there is no mask."""
    x, y = points_xy.reshape(-1, 2).T
    if mask is None:
        x1, y1, x2, y2 = box
        indices: NDArray[np.int64] = np.flatnonzero((x >= x1) & (x < x2) & (y >= y1) & (y < y2))
        return indices
    height, width = mask.pixels.shape
    column, row = np.floor(x).astype(int) - mask.left, np.floor(y).astype(int) - mask.top
    within = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    candidates: NDArray[np.int64] = np.flatnonzero(within)
    inside: NDArray[np.int64] = candidates[mask.pixels[row[within], column[within]]]
    return inside
