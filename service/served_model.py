"""What is served: a model with its name, its version and the names of its classes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import DAT, VARIANTS, create_model
from model.checkpoint import Checkpoint, CheckpointError, head_classes, read
from service import settings

_DEMO_CHECKPOINT = Path(__file__).parent.parent / "demo" / "dat_nano.safetensors"
_IMAGENET_LABELS = Path(__file__).parent / "labels" / "imagenet1k.json"


@dataclass(frozen=True)
class ServedModel:
    """A loaded classifier and how answers name things.

    Attributes:
        name: that requests use.
        version: shown in every answer.
        labels: class names, in order of the class index.
        network: the module, with its weights, on the CPU.
        source: the file the weights came from.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    network: DAT
    source: Path


def load(chosen: settings.Model) -> ServedModel:
    """Read the weights and the class names.

    Raises:
        CheckpointError: the checkpoint cannot be used; the message says which file, which key
            and what was expected.
    """
    if chosen.name not in VARIANTS:
        raise CheckpointError(f"no variant {chosen.name!r}; there are {', '.join(VARIANTS)}")
    path = chosen.checkpoint or (_DEMO_CHECKPOINT if chosen.name == "dat_nano" else None)
    if path is None:
        raise CheckpointError(f"{chosen.name} has no bundled weights: set DAT_MODEL__CHECKPOINT")
    checkpoint = read(path)
    classes = head_classes(checkpoint.state) or VARIANTS[chosen.name].num_classes
    network = create_model(chosen.name, num_classes=classes)
    try:
        network.load_state_dict(checkpoint.state)
    except (CheckpointError, RuntimeError) as fault:
        raise CheckpointError(f"{path}: {fault}") from fault
    broken = [name for name, value in network.named_parameters() if not _finite(value)]
    if broken:
        raise CheckpointError(f"{path}: not a number in {', '.join(broken[:8])}")
    labels = _labels(chosen.labels, checkpoint, classes)
    return ServedModel(chosen.name, chosen.version, labels, network, path)


def _finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _labels(path: Path | None, checkpoint: Checkpoint, classes: int) -> tuple[str, ...]:
    source: Path | str = path or "the checkpoint"
    if path is not None:
        names = _read_labels(path)
    elif checkpoint.labels is not None:
        names = checkpoint.labels
    elif classes == 1000:
        source, names = _IMAGENET_LABELS, _read_labels(_IMAGENET_LABELS)
    else:
        raise CheckpointError(f"no names for {classes} classes: set DAT_MODEL__LABELS")
    if len(names) != classes:
        raise CheckpointError(f"{source} names {len(names)} classes; the model has {classes}")
    return tuple(names)


def _read_labels(path: Path) -> list[str]:
    """A JSON list of names, or of objects with a `name`."""
    try:
        entries = json.loads(path.read_text("utf-8"))
        return [entry if isinstance(entry, str) else str(entry["name"]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise CheckpointError(
            f"{path}: not a JSON list of class names ({type(fault).__name__}: {fault})"
        ) from fault
