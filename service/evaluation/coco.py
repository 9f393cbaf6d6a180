"""Average precision of a detector's boxes and masks, as COCO defines it, by pycocotools."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, Literal

from service.detector import DetectedImage, DetectOptions, DetectorCore
from service.evaluation.run import Answers, AnyCore, Evaluation, EvaluationError
from service.masks import RunLengths
from service.settings import ResizeMode

# The first numbers of pycocotools' summary.
_SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class CocoPrecision(Evaluation[DetectedImage]):
    """Average precision on the images of a COCO annotation file.

    Images that cannot be decoded count as images without detections. Without a resize mode, it is
    that of the model.

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
            raise EvaluationError("pip install pycocotools, which measures the precision") from (
                missing
            )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._truth = COCO(str(annotations))
            self._ids = {image["file_name"]: image["id"] for image in self._truth.imgs.values()}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as fault:
            raise EvaluationError(f"{annotations}: not COCO annotations: {fault!r}") from fault
        self._annotations = annotations
        self._resize_mode = resize_mode

    @property
    def data(self) -> list[str]:  # noqa: D102
        return [*super().data, str(self._annotations.resolve())]

    def files(self, core: AnyCore) -> list[str]:  # noqa: D102
        if not isinstance(core, DetectorCore):
            raise EvaluationError(f"{core.card.name} is no detector")
        by_name = {one["name"]: one["id"] for one in self._truth.cats.values()}
        missing = [label.name for label in core.labels if label.name not in by_name]
        if missing:
            raise EvaluationError(
                f"{self._annotations}: has no category {missing[0]!r}, expected the "
                f"{len(core.labels)} classes of {core.card.name}"
            )
        self._categories = [by_name[label.name] for label in core.labels]
        self._has_masks = core.has_masks
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
