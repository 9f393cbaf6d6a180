"""Segmentation: what every pixel of an image is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from model.config import DatConfig
from model.segmentation.config import RATIOS, SegmenterConfig
from model.segmentation.transforms import Resizing, to_model_pixels
from service.batching.queue import Queue
from service.engine.items import SegmentationInput, SegmentationOutput
from service.errors import EngineFailed, InvalidImage, InvalidOption, quoted
from service.images.decode import Empty, Source, decode_pixels
from service.images.decoders import Decoders
from service.metrics.model import ModelMetrics
from service.models.card import Label, ModelCard
from service.pictures.colours import Colour
from service.pictures.indexed import MOST_COLOURS, indexed_png
from service.pictures.regions import NamedRegion, Regions
from service.settings.limits import Limits
from service.tasks import attention, explanation, segments
from service.tasks.attention import Seen
from service.tasks.core import Answer, Options
from service.tasks.drawing import Drawing, Shown
from service.tasks.masks import EncodedMask
from service.tasks.passage import ImagePassage, Timing
from service.tasks.pictures import PicturedCore, PictureOptions
from service.tasks.segments import Labels, Part, PixelBox

SegmentFormat = Literal["png", "rle", "polygon", "summary"]
TestTime = Literal["official", "official_ms"]

# Points at which the outlines in a label map turn; more take seconds and many megabytes.
MOST_TURNS = 250_000
_OFFICIAL = RATIOS.index(1.0)


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(Options):
    """What a request for segments may ask for.

    Attributes:
        format: form of the labels: one indexed PNG, run lengths or polygons of each class, or none.
        classes: names of the classes that are wanted; empty means all.
        min_share: least share of the pixels of a class that is wanted.
        confidence: whether it is wanted how sure each label is.
        test_time: `official_ms` sees the image at six scales, each mirrored as well.
        encoded: whether what is one value for each pixel is wanted as PNG, too, and not only as
            arrays.
    """

    format: SegmentFormat = "png"
    classes: tuple[str, ...] = ()
    min_share: float = 0.0
    confidence: bool = False
    test_time: TestTime = "official"
    encoded: bool = True

    @property
    @override
    def long_answer(self) -> bool:
        return super().long_answer or self.format != "summary" or self.confidence


@dataclass(frozen=True)
class Segment:
    """The pixels of one class in an image.

    Attributes:
        label: the class.
        index: of the class.
        colour: of the class, RGB.
        share: of the pixels of the image, from 0 to 1.
        box: `(x1, y1, x2, y2)` around them, pixels of the uploaded image after its EXIF
            orientation.
        probability: of the class, the mean over these pixels; `None` when not computed.
        mask: the pixels, or `None` when not asked for.
    """

    label: str
    index: int
    colour: Colour
    share: float
    box: PixelBox
    probability: float | None
    mask: EncodedMask | None


@dataclass(frozen=True, kw_only=True)
class SegmentedImage(Answer):
    """What the pixels of one image are.

    Attributes:
        segments: the largest first.
        labels: `(H, W)`, the index of each pixel's class; of a class that is not wanted, the one
            behind the last.
        label_map: the same as an indexed PNG, or `None` when not asked for.
        margins: `(H, W)`, 255 times by how much the probability of each label is above the next, or
            `None` when not asked for.
        confidence: the same as a grey PNG, or `None` when not asked for.
        input_size: `(H, W)` that the network saw, pixels; of several scales the official one.
    """

    segments: tuple[Segment, ...]
    labels: Labels
    label_map: bytes | None
    margins: NDArray[np.uint8] | None
    confidence: bytes | None
    input_size: tuple[int, int]


@dataclass(frozen=True)
class PreparedForSegmentation:
    """One image, ready for the segmenter.

    Attributes:
        scales: as in `SegmentationInput`.
        resizing: to the official one of them.
    """

    scales: tuple[NDArray[np.uint8], ...]
    resizing: Resizing


class SegmentationCore(PicturedCore[SegmentOptions, SegmentedImage]):
    """Answers requests of one segmenter."""

    def __init__(
        self,
        config: SegmenterConfig,
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
        self._names = {label.name for label in labels}
        self._palette = tuple(label.colour or (0, 0, 0) for label in labels)

    @property
    @override
    def network(self) -> DatConfig:
        return self._config.backbone

    @property
    @override
    def shown(self) -> tuple[Shown, ...]:
        return ("segments",)

    @override
    def pictured(
        self, asked: PictureOptions, drawing: Drawing, every_task: dict[str, Any]
    ) -> SegmentOptions:
        name = self.card.name
        if objects := [one for one in drawing.show if one in ("boxes", "masks")]:
            raise InvalidOption(
                f"{name} is a segmenter, which finds no {objects[0]}; show segments, points, "
                "attention, arrows or keys, or name a detector"
            )
        if asked.score_threshold is not None or asked.resize_mode is not None:
            raise InvalidOption(
                f"score_threshold and resize_mode are for detectors; {name} is a segmenter"
            )
        return SegmentOptions(**every_task, classes=asked.classes, encoded=False)

    @override
    def regions(self, answer: SegmentedImage, drawing: Drawing) -> Regions | None:
        if "segments" not in drawing.show:
            return None
        return Regions(
            answer.labels.astype(np.uint8, copy=False),
            self._palette,
            tuple(NamedRegion(one.label, one.index, one.share) for one in answer.segments),
            drawing.opacity,
        )

    @override
    def answer_pixels(self, pixels: int) -> int:
        # Its labels, how sure they are, and both as files, which are rarely as large.
        return pixels

    @override
    def check(self, options: SegmentOptions) -> None:
        name = self.card.name
        if unknown := [one for one in options.classes if one not in self._names]:
            raise InvalidOption(f"{name} has no class {quoted(unknown[0])}")
        if not 0 <= options.min_share <= 1:
            raise InvalidOption(f"min_share must be from 0 to 1, not {options.min_share}")
        if options.explain == "objects":
            raise InvalidOption("explain=objects is for detectors")
        if len(self.labels) > MOST_COLOURS and options.format == "png" and options.encoded:
            raise InvalidOption(
                f"{name} has {len(self.labels)} classes, and an indexed PNG or a picture at most "
                f"{MOST_COLOURS}; ask for format rle, polygon or summary"
            )
        asked, backbone = options.explain == "attention", self._config.backbone
        attention.check(options.attention, backbone, asked=asked, model=name)

    @override
    async def answer_image(self, passage: ImagePassage, options: SegmentOptions) -> SegmentedImage:
        image = await passage.decode(lambda data, empty: self._prepare(data, options, empty))
        wanted, cells = explanation.ask(options, self._seen(image.resizing))
        summary = options.format == "summary"
        item = SegmentationInput(
            image.scales,
            image.resizing.image_size,
            explained=_OFFICIAL if len(image.scales) > 1 else 0,
            mirrored=len(image.scales) > 1,
            probabilities=summary or options.confidence,
            margins=options.confidence,
            wanted=wanted,
            cells=cells,
        )
        output: SegmentationOutput
        output, timing = await passage.submit(item)
        # Of a large image that takes a second.
        return await self._decoders.run_now(
            lambda: self._answer(image.resizing, output, options, timing)
        )

    def _seen(self, resizing: Resizing) -> Seen:
        backbone, size = self._config.backbone, resizing.resized
        return Seen(backbone, size, size, resizing.image_size, resizing)

    def _prepare(
        self, upload: Source, options: SegmentOptions, empty: Empty
    ) -> PreparedForSegmentation:
        pixels = decode_pixels(upload, self._limits)
        height, width, _ = pixels.shape
        image_size = (height, width)
        ratios = RATIOS if options.test_time == "official_ms" else (1.0,)
        resizings = [self._config.resizing(image_size, ratio) for ratio in ratios]
        if misfits := [resizing.misfit for resizing in resizings if not resizing.fits]:
            raise InvalidImage("unsupported", misfits[0])
        shapes = [(*resizing.resized, 3) for resizing in resizings]
        ends = np.cumsum([np.prod(shape) for shape in shapes])
        # Only one array may lie in the memory that the worker shares.
        together = empty((int(ends[-1]),))
        scales = tuple(
            to_model_pixels(pixels, resizing, room.reshape(shape))
            for resizing, room, shape in zip(
                resizings, np.split(together, ends[:-1]), shapes, strict=True
            )
        )
        return PreparedForSegmentation(scales, self._config.resizing(image_size))

    def _answer(
        self,
        resizing: Resizing,
        output: SegmentationOutput,
        options: SegmentOptions,
        timing: Timing,
    ) -> SegmentedImage:
        if not output.finite:
            raise EngineFailed("the model gave values that are not numbers for this image")
        height, width = resizing.image_size
        told = explanation.tell(options, self._seen(resizing), output)
        every = segments.parts(output.labels, len(self.labels))
        wanted = [part for part in every if self._is_wanted(part, height * width, options)]
        labels: Labels = output.labels
        if len(wanted) < len(every):
            kept = [part.index for part in wanted]
            labels = segments.with_others_as_one(labels, kept, len(self.labels))
        label_map = confidence = None
        if options.encoded and options.format == "png":
            label_map = indexed_png(labels, self._palette)
        if options.encoded and output.margins is not None:
            confidence = segments.grey_png(output.margins)
        masks = _masks(labels, wanted, options)
        return SegmentedImage(
            width=width,
            height=height,
            timing=timing,
            points=told.points,
            attention=told.attention,
            segments=tuple(
                self._segment(part, output, mask) for part, mask in zip(wanted, masks, strict=True)
            ),
            labels=labels,
            label_map=label_map,
            margins=output.margins,
            confidence=confidence,
            input_size=resizing.resized,
        )

    def _is_wanted(self, part: Part, pixels: int, options: SegmentOptions) -> bool:
        if options.classes and self.labels[part.index].name not in options.classes:
            return False
        return part.pixels / pixels >= options.min_share

    def _segment(self, part: Part, output: SegmentationOutput, mask: EncodedMask | None) -> Segment:
        sums = output.probabilities
        return Segment(
            label=self.labels[part.index].name,
            index=part.index,
            colour=self._palette[part.index],
            share=part.pixels / output.labels.size,
            box=part.box,
            probability=None if sums is None else float(sums[part.index]) / part.pixels,
            mask=mask,
        )


def _masks(
    labels: Labels, wanted: Sequence[Part], options: SegmentOptions
) -> Sequence[EncodedMask | None]:
    """The pixels of each class in the form that was asked for.

    Raises:
        InvalidOption: they have too many corners for polygons.
    """
    if options.format == "rle":
        return segments.run_lengths(labels, [part.index for part in wanted])
    if options.format != "polygon":
        return [None] * len(wanted)
    turns = segments.turns(labels)
    if turns > MOST_TURNS:
        raise InvalidOption(
            f"the outlines in the image turn at {turns} points; at most {MOST_TURNS} are traced, "
            "so ask for format rle or png, for fewer classes or for a larger min_share"
        )
    return [segments.outlines(labels, part) for part in wanted]
