"""Images with the right class of every pixel, and how many pixels of each class a model finds.

That is the layout of ADE20K's scene parsing benchmark: a folder of images, and one of label maps
with the same names that end in `.png`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.evaluation.accuracy import SUFFIXES
from service.evaluation.run import Answers, EvaluationError

IGNORED = -1
_IGNORED_IN_FILE = 255
_INDEXED = ("L", "P", "I;16", "I")  # modes of Pillow whose pixels are numbers

# By the index of a class, as JSON has keys: pixels that were found and right, that were found, and
# that were to be found.
Areas = dict[str, tuple[int, int, int]]


class LabelMaps:
    """The images of a folder with their label maps.

    Args:
        images: in any subfolders.
        maps: PNG files with an index for each pixel, in the same subfolders. 255 is ignored.
        reduce_zero_label: whether 0 is ignored too, and 1 is the first class, as in ADE20K's files.
    """

    def __init__(self, images: Path, maps: Path, *, reduce_zero_label: bool = False) -> None:
        self.images, self.maps = images, maps
        self.reduce_zero_label = reduce_zero_label

    def files(self) -> list[str]:
        """The paths of all images, relative to their folder, in order.

        Raises:
            EvaluationError: there is no such folder, nothing in it, or an image has no label map.
        """
        for folder in (self.images, self.maps):
            if not folder.is_dir():
                raise EvaluationError(f"{folder}: no such folder")
        found = sorted(self.images.rglob("*"))
        files = [str(p.relative_to(self.images)) for p in found if p.suffix.lower() in SUFFIXES]
        if not files:
            raise EvaluationError(f"{self.images}: no {', '.join(sorted(SUFFIXES))} in it")
        absent = [path for path in map(self._map_of, files) if not path.is_file()]
        if absent:
            raise EvaluationError(
                f"{absent[0]}: no such file; {len(absent)} of the {len(files)} images of "
                f"{self.images} have no label map"
            )
        return files

    def right(self, file: str, classes: int) -> NDArray[np.int32]:
        """The right class `(H, W)` of every pixel of an image, or `IGNORED`.

        Raises:
            EvaluationError: the label map cannot be used, or has classes that the model has not.
        """
        path = self._map_of(file)
        try:
            with Image.open(path) as image:
                if image.mode not in _INDEXED:
                    raise EvaluationError(
                        f"{path}: has pixels of mode {image.mode}, expected one index for each"
                    )
                stored = np.asarray(image).astype(np.int32)
        except (OSError, ValueError, SyntaxError) as fault:
            raise EvaluationError(f"{path}: not a readable label map: {fault}") from fault
        labels = stored - 1 if self.reduce_zero_label else stored
        labels[stored == _IGNORED_IN_FILE] = IGNORED
        if labels.max(initial=IGNORED) >= classes:
            hint = "" if self.reduce_zero_label else "; in ADE20K's files 1 is the first class"
            raise EvaluationError(
                f"{path}: has the index {stored[labels >= classes].max()}, and the model tells "
                f"{classes} classes apart{hint}"
            )
        return labels

    def areas(self, file: str, found: NDArray[np.integer[Any]], classes: int) -> Areas:
        """Of every class in an image, how many pixels were right, found and to be found.

        Args:
            file: the image.
            found: the class `(H, W)` that the model gives to every pixel.
            classes: how many there are.

        Raises:
            EvaluationError: the label map cannot be used, or is of another size.
        """
        right = self.right(file, classes)
        if right.shape != found.shape:
            sizes = " and ".join(
                f"{width}x{height}" for height, width in (found.shape, right.shape)
            )
            raise EvaluationError(f"{self._map_of(file)}: image and label map have {sizes} pixels")
        counted = right != IGNORED
        right, found = right[counted], found[counted]
        counts = (
            np.bincount(labels, minlength=classes)
            for labels in (right[right == found], found, right)
        )
        table = np.stack(list(counts), 1)
        return {str(index): _three(table[index]) for index in np.flatnonzero(table.any(1))}

    def nothing_found(self, file: str, classes: int) -> Areas:
        """`areas` of an image that could not be decoded."""
        right = self.right(file, classes)
        counts = np.bincount(right[right != IGNORED], minlength=classes)
        return {str(index): (0, 0, int(counts[index])) for index in np.flatnonzero(counts)}

    def _map_of(self, file: str) -> Path:
        return (self.maps / file).with_suffix(".png")


def _three(counts: NDArray[np.int64]) -> tuple[int, int, int]:
    right, found, wanted = counts.tolist()
    return right, found, wanted


def mean_iou(
    answers: Sequence[Mapping[str, Sequence[int]]], names: Sequence[str]
) -> dict[str, Any]:
    """Figures of all images together, as mmsegmentation defines them.

    Args:
        answers: the `Areas` of every image.
        names: of the classes.

    Returns:
        `aAcc`: the share of pixels that are right. `mIoU`: the mean over classes of the pixels
        that are right as a share of those that were found or to be found. `mAcc`: of those that
        were to be found. `IoU` of each class by its name, `None` where it was neither found nor
        to be found; such a class is in no mean.
    """
    total = np.zeros((len(names), 3), np.int64)
    for areas in answers:
        for index, counts in areas.items():
            total[int(index)] += counts
    right, found, wanted = total.T
    united = found + wanted - right
    iou = [float(r / u) if u else None for r, u in zip(right, united, strict=True)]
    recalled = [float(r / w) for r, w in zip(right, wanted, strict=True) if w]
    present = [share for share in iou if share is not None]
    return {
        "aAcc": round(float(right.sum() / wanted.sum()), 4) if wanted.any() else None,
        "mIoU": round(float(np.mean(present)), 4) if present else None,
        "mAcc": round(float(np.mean(recalled)), 4) if recalled else None,
        "IoU": {
            name: None if share is None else round(share, 4)
            for name, share in zip(names, iou, strict=True)
        },
    }


def measured(maps: LabelMaps, answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Figures of the answers of a journal; images without one count as wrong."""
    areas = [
        maps.nothing_found(file, len(names)) if answer is None else answer
        for file, answer in answers.items()
    ]
    return mean_iou(areas, names)
