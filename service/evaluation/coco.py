"""Average precision of a detector's boxes and masks, as COCO defines it, by pycocotools."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import structlog
from pydantic import (
    BaseModel,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from service.evaluation.run import Answers, Evaluation, EvaluationError
from service.settings.model import ResizeMode
from service.tasks.core import AnyCore
from service.tasks.detection import DetectedImage, DetectionCore, DetectOptions
from service.tasks.masks import RunLengths
from service.text_file import read_text

log = structlog.get_logger(__name__)

# The first numbers of pycocotools' summary.
_SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_Length = Annotated[FiniteFloat, Field(ge=0)]
_LEAST_POLYGON = 6  # numbers; pycocotools takes four for a box


class _Image(BaseModel):
    id: int
    file_name: str
    height: PositiveInt | None = None
    width: PositiveInt | None = None


class _Category(BaseModel):
    id: int
    name: str


class _Runs(BaseModel):
    """Runs of pixels, as numbers or compressed."""

    size: tuple[PositiveInt, PositiveInt]
    counts: list[NonNegativeInt] | str


class _Annotation(BaseModel):
    """One object; a file that comes from elsewhere than COCO may have boxes alone."""

    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, _Length, _Length]
    area: _Length | None = None
    iscrowd: bool = False
    segmentation: _Runs | list[list[FiniteFloat]] | None = Field(None, union_mode="left_to_right")

    @field_validator("segmentation")
    @classmethod
    def _drawable(cls, value: Any) -> Any:
        if isinstance(value, _Runs) and isinstance(value.counts, list):
            pixels = value.size[0] * value.size[1]
            if sum(value.counts) != pixels:
                raise ValueError(f"runs of {sum(value.counts)} pixels, expected {pixels}")
        if isinstance(value, list):
            for polygon in value:
                if len(polygon) < _LEAST_POLYGON or len(polygon) % 2:
                    raise ValueError(f"a polygon of {len(polygon)} numbers, expected pairs from 6")
        return value or None


class _Truth(BaseModel):
    """What is used of an annotation file (https://cocodataset.org/#format-data)."""

    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]

    def faults(self) -> Iterator[str]:
        """What contradicts itself in the file, a sentence each."""
        if not self.images:
            yield "images: there is not one"
        for name, keys in (
            ("images: the id", [image.id for image in self.images]),
            ("images: the file_name", [image.file_name for image in self.images]),
            ("categories: the id", [category.id for category in self.categories]),
            ("categories: the name", [category.name for category in self.categories]),
        ):
            yield from (f"{name} {key!r} is there twice" for key in _twice(keys))
        images = {image.id: image for image in self.images}
        categories = {category.id for category in self.categories}
        for index, annotation in enumerate(self.annotations):
            if annotation.image_id not in images:
                yield f"annotations.{index}: there is no image {annotation.image_id}"
                continue
            if annotation.category_id not in categories:
                yield f"annotations.{index}: there is no category {annotation.category_id}"
            image, drawn = images[annotation.image_id], annotation.segmentation
            size = image.height, image.width
            if isinstance(drawn, _Runs) and None not in size and drawn.size != size:
                yield (
                    f"annotations.{index}: a segmentation of {drawn.size} pixels, expected {size} "
                    "as its image has"
                )

    @property
    def has_masks(self) -> bool:
        """Whether every object has a mask, and its image the size that it is drawn in."""
        sized = {image.id for image in self.images if image.height and image.width}
        return all(one.segmentation and one.image_id in sized for one in self.annotations)

    def dataset(self) -> dict[str, Any]:
        """The file for pycocotools, with what may be left out put in."""
        annotations = [
            {
                **annotation.model_dump(mode="json", exclude_none=True),
                "id": index,  # pycocotools takes 0 for a detection without a match
                "area": annotation.bbox[2] * annotation.bbox[3]
                if annotation.area is None
                else annotation.area,
                "iscrowd": int(annotation.iscrowd),
            }
            for index, annotation in enumerate(self.annotations, 1)
        ]
        return {
            "images": [image.model_dump() for image in self.images],
            "annotations": annotations,
            "categories": [category.model_dump() for category in self.categories],
        }


def _twice(keys: Iterable[object]) -> list[object]:
    return [key for key, count in Counter(keys).items() if count > 1]


def _read(path: Path) -> _Truth:
    """Read and check an annotation file.

    Raises:
        EvaluationError: the annotations cannot be used.
    """
    try:
        truth = _Truth.model_validate_json(read_text(path))
    except ValidationError as faults:
        first, *others = faults.errors(include_url=False, include_input=False)
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        more = f", and {len(others)} more" if others else ""
        fault = f"{where}: {message}{more}" if where else message
        raise EvaluationError(f"{path}: not COCO annotations: {fault}") from faults
    except (OSError, ValueError) as cause:
        raise EvaluationError(f"{path}: not COCO annotations: {cause}") from cause
    if (contradiction := next(truth.faults(), None)) is not None:
        raise EvaluationError(f"{path}: {contradiction}")
    return truth


class CocoPrecision(Evaluation[DetectedImage]):
    """Average precision on the images of a COCO annotation file.

    Images that cannot be decoded count as images without detections. Without a resize mode, it is
    that of the model. Without a segmentation of every object boxes are measured alone; the area of
    an object is that of its box where there is none, and it is no crowd where nothing says so.

    Raises:
        EvaluationError: pycocotools is not installed, or the annotations cannot be used.
    """

    def __init__(
        self, folder: Path, annotations: Path, resize_mode: ResizeMode | None = None
    ) -> None:
        super().__init__(folder)
        try:
            from pycocotools.coco import COCO  # noqa: PLC0415
        except ImportError as missing:
            raise EvaluationError(
                "pycocotools, which measures the precision, is missing: pip install pycocotools"
            ) from missing
        given = _read(annotations)
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = COCO()
            self._truth.dataset = given.dataset()  # type: ignore[assignment]
            self._truth.createIndex()
        self._given = given
        self._ids = {image.file_name: image.id for image in given.images}
        self._annotations = annotations
        self._resize_mode = resize_mode

    @property
    def data(self) -> list[str]:  # noqa: D102
        return [*super().data, str(self._annotations.resolve())]

    def files(self, core: AnyCore) -> list[str]:  # noqa: D102
        if not isinstance(core, DetectionCore):
            raise EvaluationError(
                f"{core.card.name} is not a detector; leave --coco out to measure a classifier, "
                "give --segmentation instead to measure a segmenter"
            )
        by_name = {category.name: category.id for category in self._given.categories}
        missing = [label.name for label in core.labels if label.name not in by_name]
        if missing:
            raise EvaluationError(
                f"{self._annotations}: has no category {missing[0]!r}, expected the "
                f"{len(core.labels)} classes of {core.card.name}"
            )
        self._categories = [by_name[label.name] for label in core.labels]
        if not any(one.category_id in self._categories for one in self._given.annotations):
            raise EvaluationError(f"{self._annotations}: annotates no object of these classes")
        try:
            absent = [file for file in self._ids if not (self.folder / file).is_file()]
        except OSError as fault:
            raise EvaluationError(f"{self.folder}: {fault}") from fault
        if absent:
            raise EvaluationError(
                f"{self.folder / absent[0]}: no such file; {len(absent)} of the {len(self._ids)} "
                f"images of {self._annotations} are not there"
            )
        self._has_masks = core.has_masks and self._given.has_masks
        if core.has_masks and not self._has_masks:
            log.warning("masks are not measured", reason="some objects have no segmentation")
        return sorted(self._ids)

    def options(self, timeout_s: float) -> DetectOptions:  # noqa: D102
        return DetectOptions(timeout_s=timeout_s, resize_mode=self._resize_mode)

    def conditions(self, core: AnyCore) -> dict[str, Any]:  # noqa: D102
        mode = self._resize_mode or core.card.resize_mode
        size = {"letterbox_size": core.card.letterbox_size} if mode == "letterbox" else {}
        return {"resize_mode": mode, **size}

    def record(self, answer: DetectedImage) -> list[dict[str, Any]]:  # noqa: D102
        records = []
        for found in answer.detections:
            x1, y1, x2, y2 = found.box
            record: dict[str, Any] = {
                "category_id": self._categories[found.index],
                "score": found.score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            if isinstance(found.mask, RunLengths):
                record["segmentation"] = {
                    "size": list(found.mask.image_size),
                    "counts": found.mask.counts,
                }
            records.append(record)
        return records

    def measure(self, answers: Answers) -> dict[str, Any]:  # noqa: D102
        results = [
            record | {"image_id": self._ids[file]}
            for file, records in answers.items()
            for record in records or ()
        ]
        figures = {"box": self._precision(results, "bbox")}
        if self._has_masks:
            figures["mask"] = self._precision(results, "segm")
        return figures

    def _precision(
        self, results: list[dict[str, Any]], kind: Literal["bbox", "segm"]
    ) -> dict[str, float]:
        if not results:  # pycocotools cannot load nothing
            return dict.fromkeys(_SUMMARY, 0.0)
        from pycocotools.cocoeval import COCOeval  # noqa: PLC0415

        with contextlib.redirect_stdout(io.StringIO()):
            # loadRes writes into what it is given.
            copied = json.loads(json.dumps(results))
            evaluation = COCOeval(self._truth, self._truth.loadRes(copied), kind)
            evaluation.params.catIds = sorted(self._categories)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {
            name: round(float(value), 4)
            for name, value in zip(_SUMMARY, evaluation.stats, strict=False)
        }
