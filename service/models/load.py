"""What is served: a model with its name, its version and the names of its classes."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model import DAT, VARIANTS, load_model
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, CheckpointError
from model.cost import Cost, cost
from model.detection import DETECTORS, Detector, load_detector
from model.detection.official import is_detector
from service.metrics import Task
from service.settings import ModelChoice, ResizeMode
from service.text_file import read_text

_DEMO = Path(__file__).parent.parent.parent / "demo"
BUNDLED = {
    "dat_nano": _DEMO / "dat_nano.safetensors",
    "mask_rcnn_dat_nano": _DEMO / "detection" / "mask_rcnn_dat_nano.safetensors",
}
_DEFAULT = "dat_nano"
# Of classifiers and of detectors with as many classes.
_IMAGENET = (1000, Path(__file__).parent / "labels" / "imagenet1k.json")
_COCO = (80, Path(__file__).parent / "labels" / "coco.json")
_ALL_VARIANTS = (*VARIANTS, *DETECTORS)


@dataclass(frozen=True)
class Label:
    """The name of a class, and its WordNet id where it has one."""

    name: str
    wnid: str | None = None


@dataclass(frozen=True)
class ServedModel:
    """A loaded classifier and how answers name things.

    Attributes:
        name: that requests use.
        version: shown in every answer.
        labels: one for each class, in order of the class index.
        network: the module, with its weights, on the CPU.
        cost: of one image.
        source: the file the weights came from.
    """

    name: str
    version: str
    labels: tuple[Label, ...]
    network: DAT
    cost: Cost
    source: Path


@dataclass(frozen=True)
class ServedDetector:
    """A loaded detector and how answers name things.

    Attributes:
        name: that requests use.
        version: shown in every answer.
        labels: one for each class, in order of the class index.
        detector: the module, with its weights, on the CPU.
        resize_mode: of requests that name none.
        letterbox_size: side of the letterbox, pixels.
        source: the file the weights came from.
    """

    name: str
    version: str
    labels: tuple[Label, ...]
    detector: Detector
    resize_mode: ResizeMode
    letterbox_size: int
    source: Path


@dataclass(frozen=True)
class ModelCard:
    """What a caller may know of a model.

    Attributes:
        name: that requests use.
        version: shown in every answer.
        task: what it does.
        variant: which network it is.
        image_size: `(H, W)` of its input, pixels; `None` where it changes with the image.
        resize_mode: of a detector, for requests that name none.
        letterbox_size: side of a detector's letterbox, pixels.
        classes: how many it tells apart.
        parameters: as published for the variant.
        flops: of one image, see `model.cost`; `None` where they change with the image.
        device: that runs it.
        dtype: of its features.
        max_batch: most images in one batch.
    """

    name: str
    version: str
    task: Task
    variant: str
    image_size: tuple[int, int] | None
    resize_mode: ResizeMode | None
    letterbox_size: int | None
    classes: int
    parameters: int
    flops: int | None
    device: str
    dtype: str
    max_batch: int

    @classmethod
    def of_detector(
        cls, served: ServedDetector, *, device: str, dtype: str, max_batch: int
    ) -> "ModelCard":
        """The card of a loaded detector on its device."""
        config = served.detector.config
        return cls(
            served.name,
            served.version,
            "detect",
            config.name,
            None,
            served.resize_mode,
            served.letterbox_size,
            config.num_classes,
            sum(parameter.numel() for parameter in served.detector.parameters()),
            None,
            device,
            dtype,
            max_batch,
        )

    @classmethod
    def of(cls, served: ServedModel, *, device: str, dtype: str, max_batch: int) -> "ModelCard":
        """The card of a loaded classifier on its device."""
        config = served.network.config
        return cls(
            served.name,
            served.version,
            "classify",
            config.name,
            config.image_size,
            None,
            None,
            config.num_classes,
            served.cost.parameters,
            served.cost.flops,
            device,
            dtype,
            max_batch,
        )


def load(chosen: ModelChoice) -> ServedModel | ServedDetector:
    """Read the weights and the class names.

    Raises:
        CheckpointError: the checkpoint cannot be used; the message says which file, which key
            and what was expected.
    """
    variant = chosen.variant or (chosen.name if chosen.name in _ALL_VARIANTS else None)
    path = chosen.checkpoint
    if path is None:
        variant = variant or (_DEFAULT if chosen.name is None else None)
        path = _bundled(variant or chosen.name)
    if chosen.sha256 is not None:
        _check_sha256(path, chosen.sha256.lower())
    checkpoint = checkpoints.read(path, ema=chosen.weights == "ema")
    if holds_detector(checkpoint, variant):
        return load_served_detector(chosen, checkpoint, variant)
    if chosen.resize_mode is not None or chosen.letterbox_size is not None:
        raise CheckpointError(
            f"{path}: a classifier has one way to resize; resize_mode and letterbox_size are for "
            "detectors"
        )
    network = load_model(checkpoint, variant, both_sides(chosen.image_size))
    labels = _labels(chosen.labels, checkpoint, network.config.num_classes, _IMAGENET)
    name = chosen.name or network.config.name
    return ServedModel(name, chosen.version, labels, network, cost(network), path)


def holds_detector(checkpoint: Checkpoint, variant: str | None) -> bool:
    """Whether the weights are of a detector: what was named decides, else their own names."""
    return variant in DETECTORS or (variant is None and is_detector(checkpoint.state))


def load_served_detector(
    chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None
) -> ServedDetector:
    """A detector and the names of its classes, from what was read.

    Raises:
        CheckpointError: the weights, the class names or the choice cannot be used.
    """
    if chosen.image_size is not None:
        raise CheckpointError(
            f"{checkpoint.path}: a detector takes every image at a size of its own; image_size "
            "is for classifiers"
        )
    loaded = load_detector(checkpoint, variant)
    config = loaded.detector.config
    if chosen.labels is None and loaded.labels is not None:
        labels = _unmarked(tuple(map(Label, loaded.labels)))
    else:
        labels = _labels(chosen.labels, checkpoint, config.num_classes, _COCO)
    name = chosen.name or config.name
    return ServedDetector(
        name,
        chosen.version,
        labels,
        loaded.detector,
        chosen.resize_mode or "official",
        chosen.letterbox_size or config.letterbox_size,
        checkpoint.path,
    )


def _bundled(variant: str | None) -> Path:
    if variant in BUNDLED:
        return BUNDLED[variant]
    if variant not in _ALL_VARIANTS:
        raise CheckpointError(f"no variant {variant!r}; there are {', '.join(_ALL_VARIANTS)}")
    raise CheckpointError(f"{variant} has no bundled weights: set DAT_MODEL__CHECKPOINT")


def _check_sha256(path: Path, expected: str) -> None:
    found = checkpoints.sha256(path)
    if found != expected:
        raise CheckpointError(f"{path}: has the SHA-256 {found}, expected {expected}")


def both_sides(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """`(H, W)` from what the settings allow: a side, or both."""
    return (size, size) if isinstance(size, int) else size


def _labels(
    path: Path | None, checkpoint: Checkpoint, classes: int, known: tuple[int, Path]
) -> tuple[Label, ...]:
    if path is not None:
        return read_labels(path, classes)
    if (stored := checkpoint.metadata.get("labels")) is not None:
        return _expect(_parse_labels(stored, checkpoint.path), classes, checkpoint.path)
    if classes == known[0]:
        return read_labels(known[1], classes)
    raise CheckpointError(
        f"{checkpoint.path}: has {classes} classes and no names for them: give a label file "
        "(DAT_MODEL__LABELS, or labels in the model file)"
    )


def read_labels(path: Path, classes: int) -> tuple[Label, ...]:
    """Read the names of the classes: a JSON list, or a text file with one on each line.

    Raises:
        CheckpointError: the file is unreadable, or names another number of classes.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{path}: not a readable label file: {fault}") from fault
    if path.suffix == ".json":
        return _expect(_parse_labels(text, path), classes, path)
    names = [line.strip() for line in text.splitlines()]
    if "" in names:
        raise CheckpointError(f"{path}: line {names.index('') + 1} is empty, expected a class name")
    return _expect(tuple(map(Label, names)), classes, path)


def _expect(labels: tuple[Label, ...], classes: int, path: Path) -> tuple[Label, ...]:
    if len(labels) != classes:
        raise CheckpointError(
            f"{path}: names {len(labels)} classes, expected the {classes} that the model has"
        )
    return _unmarked(labels)


def _unmarked(labels: tuple[Label, ...]) -> tuple[Label, ...]:
    """Labels without the byte order mark of a file that somebody once read them from."""
    return tuple(replace(label, name=label.name.removeprefix("\ufeff")) for label in labels)


def _parse_labels(text: str, path: Path) -> tuple[Label, ...]:
    """A JSON list of names, or of objects with a `name` and perhaps a `wnid`."""
    try:
        entries = json.loads(text.removeprefix("\ufeff"))
    except ValueError as fault:
        raise CheckpointError(f"{path}: not a JSON list of class names: {fault}") from fault
    if not isinstance(entries, list):
        raise CheckpointError(f"{path}: not a JSON list of class names")
    return tuple(_label(index, entry, path) for index, entry in enumerate(entries))


def _label(index: int, entry: Any, path: Path) -> Label:
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise CheckpointError(
            f"{path}: class {index} is {entry!r:.50}, expected a name or an object with a `name`"
        )
    wnid = given.get("wnid")
    return Label(given["name"], wnid if isinstance(wnid, str) else None)
