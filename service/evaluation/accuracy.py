"""Top-1 and top-5 accuracy of a classifier on a folder with one subfolder for each class.

That is the layout of torchvision's ImageFolder, and of ImageNet's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.evaluation.run import Answers, Evaluation, EvaluationError
from service.models.card import Label
from service.tasks.classification import Classification, ClassificationCore, ClassifyOptions
from service.tasks.core import AnyCore

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_TOP_K = 5


class Accuracy(Evaluation[Classification]):
    """The share of images whose class came first, and was among the first five.

    Images that cannot be decoded count as wrong.
    """

    def files(self, core: AnyCore) -> list[str]:  # noqa: D102
        if not isinstance(core, ClassificationCore):
            raise EvaluationError(
                f"{core.card.name} is not a classifier; give --coco to measure a detector, "
                "--segmentation to measure a segmenter"
            )
        self._targets = find_images(self.folder, core.labels)
        return list(self._targets)

    def options(self, timeout_s: float) -> ClassifyOptions:  # noqa: D102
        return ClassifyOptions(top_k=_TOP_K, timeout_s=timeout_s)

    def record(self, answer: Classification) -> list[int]:  # noqa: D102
        return [prediction.index for prediction in answer.predictions]

    def measure(self, answers: Answers) -> dict[str, Any]:  # noqa: D102
        return top_k_accuracy([(self._targets[file], top) for file, top in answers.items()])


def find_images(folder: Path, labels: Sequence[Label]) -> dict[str, int]:
    """The images of a folder, by relative path and in order, with the index of their class.

    Subfolders are classes by their names: all are WordNet ids or names of classes, or else there
    are as many as classes, in sorted order.

    Raises:
        EvaluationError: there is no such folder, nothing in it, or its classes are not those of
            the model.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    targets = _targets(folder, classes, labels)
    images = {
        str(path.relative_to(folder)): targets[name]
        for name in classes
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    }
    if not images:
        raise EvaluationError(f"{folder}: no {', '.join(sorted(SUFFIXES))} in its subfolders")
    return images


def _targets(folder: Path, classes: list[str], labels: Sequence[Label]) -> dict[str, int]:
    for key in ([label.wnid for label in labels], [label.name for label in labels]):
        by_key = {name: index for index, name in enumerate(key)}
        if len(by_key) == len(key) and set(classes) <= by_key.keys():
            return {name: by_key[name] for name in classes}
    if len(classes) == len(labels):
        return {name: index for index, name in enumerate(classes)}
    raise EvaluationError(
        f"{folder}: has {len(classes)} subfolders that are not all names of classes, expected "
        f"those names, or {len(labels)} subfolders in the order of the classes"
    )


def top_k_accuracy(answers: Sequence[tuple[int, list[int] | None]]) -> dict[str, float]:
    """Top-1 and top-5 accuracy of the best classes of images, given with their right one."""
    return {
        "top1": sum(top is not None and top[0] == target for target, top in answers) / len(answers),
        "top5": sum(top is not None and target in top for target, top in answers) / len(answers),
    }
