"""What a folder holds that can be served, where only the folder is known, as under KServe."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from service.command_errors import StartupError
from service.settings.environment import PREFIX

MODEL_FILE = "models.toml"
_CHECKPOINTS = (".safetensors", ".pth", ".pt")
_LABELS = ("labels.txt", "labels.json")
_SHOWN = 5  # names in a message


class FolderError(StartupError):
    """A folder in which no model is found, or more than one; the message says what to do."""


@dataclass(frozen=True)
class Found:
    """What there is to serve in a folder: a model file, or one checkpoint.

    Attributes:
        model_file: that names the models.
        checkpoint: of the one model.
        labels: its class names, where they lie beside it.
    """

    model_file: Path | None = None
    checkpoint: Path | None = None
    labels: Path | None = None


def look_into(folder: Path) -> Found:
    """What is to be served of a folder.

    That is its `models.toml`; where there is none, its one checkpoint, and `labels.txt` or
    `labels.json` beside it. Hidden files and folders in it are not looked at.

    Raises:
        FolderError: the folder cannot be read, or holds no model, or more than one.
    """
    named = f"{PREFIX}MODEL__FOLDER: {folder}"
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        files = [path for path in paths if path.is_file()]
    except OSError as fault:
        raise FolderError(f"{named}: {fault.strerror}") from fault
    for path in files:
        if path.name == MODEL_FILE:
            return Found(model_file=path)
    checkpoints = [path for path in files if path.suffix in _CHECKPOINTS]
    if not checkpoints:
        there = f"there is {_names(paths)}" if paths else "it is empty"
        raise FolderError(
            f"{named}: holds no model: neither {MODEL_FILE} nor a checkpoint "
            f"({', '.join(_CHECKPOINTS)}); {there}"
        )
    if len(checkpoints) > 1:
        raise FolderError(
            f"{named}: holds {len(checkpoints)} checkpoints, {_names(checkpoints)}; "
            f"name those to be served in a {MODEL_FILE} beside them"
        )
    labels = [path for path in files if path.name in _LABELS]
    if len(labels) > 1:
        raise FolderError(f"{named}: holds both {' and '.join(_LABELS)}; leave one of them")
    return Found(checkpoint=checkpoints[0], labels=next(iter(labels), None))


def _names(paths: Collection[Path]) -> str:
    names = [path.name for path in paths]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
