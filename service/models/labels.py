"""The names of a model's classes: from a label file, from its checkpoint, or the usual ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint import Checkpoint, CheckpointError
from service.models.card import Label
from service.text_file import read_text

_FOLDER = Path(__file__).parent / "labels"
# The usual names for models whose checkpoints have none: how many classes, and their file.
IMAGENET = (1000, _FOLDER / "imagenet1k.json")
COCO = (80, _FOLDER / "coco.json")


def choose_labels(
    path: Path | None,
    checkpoint: Checkpoint,
    classes: int,
    known: tuple[int, Path] | None = None,
) -> tuple[Label, ...]:
    """The names of the classes: those of a label file, else the checkpoint's, else the usual ones.

    Args:
        path: of the label file, if there is one.
        checkpoint: may hold the names.
        classes: how many the model tells apart.
        known: how many classes the usual names are for, and the file that has them, if there are
            usual names.

    Raises:
        CheckpointError: the names cannot be used, or there are none.
    """
    if path is not None:
        return read_labels(path, classes)
    if (stored := checkpoint.metadata.get("labels")) is not None:
        return _expect(_parse_labels(stored, checkpoint.path), classes, checkpoint.path)
    if known is not None and classes == known[0]:
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
    return unmarked(labels)


def unmarked(labels: tuple[Label, ...]) -> tuple[Label, ...]:
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


def as_text(labels: tuple[Label, ...]) -> str:
    """Labels as a checkpoint keeps them, JSON."""
    return json.dumps([{"name": label.name, "wnid": label.wnid} for label in labels])
