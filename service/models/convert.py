"""Turns any readable checkpoint into one file that holds all that is known of the model."""

import json
from pathlib import Path

from model import DAT, load_model
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, CheckpointError
from model.detection import Detector
from service.models.load import (
    Label,
    both_sides,
    holds_detector,
    load_served_detector,
    read_labels,
)
from service.settings import ModelChoice


def convert(chosen: ModelChoice, out: Path) -> dict[str, str]:
    """Write the folded weights of a model to a `.safetensors` file.

    Returns:
        What was written beside the weights: variant, classes, sizes of a classifier, names of the
        classes where they are known, whether the weights are a moving average, and where they came
        from.

    Raises:
        CheckpointError: the checkpoint or the label file cannot be used, or `out` not written.
    """
    if chosen.checkpoint is None:
        raise CheckpointError("no checkpoint to convert")
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: the file to write must end in .safetensors")
    ema = chosen.weights == "ema"
    checkpoint = checkpoints.read(chosen.checkpoint, ema=ema)
    known = _detector if holds_detector(checkpoint, chosen.variant) else _classifier
    network, facts = known(chosen, checkpoint)
    metadata = {
        **facts,
        **({"weights": "ema"} if ema else {}),
        "source": chosen.checkpoint.name,
        "source_sha256": checkpoints.sha256(chosen.checkpoint),
    }
    checkpoints.write(out, network.state_dict(), metadata)
    return metadata


def _classifier(chosen: ModelChoice, checkpoint: Checkpoint) -> tuple[DAT, dict[str, str]]:
    network = load_model(checkpoint, chosen.variant, both_sides(chosen.image_size))
    config = network.config
    facts = {
        "variant": config.name,
        "image_size": json.dumps(config.image_size),
        "table_size": json.dumps(config.table_size),
        "window": json.dumps(config.window),
        "classes": json.dumps(config.num_classes),
    }
    labels = checkpoint.metadata.get("labels")
    if chosen.labels is not None:
        labels = _names(read_labels(chosen.labels, config.num_classes))
    return network, facts if labels is None else {**facts, "labels": labels}


def _detector(chosen: ModelChoice, checkpoint: Checkpoint) -> tuple[Detector, dict[str, str]]:
    served = load_served_detector(chosen, checkpoint, chosen.variant)
    config = served.detector.config
    return served.detector, {
        "variant": config.name,
        "classes": json.dumps(config.num_classes),
        "labels": _names(served.labels),
    }


def _names(labels: tuple[Label, ...]) -> str:
    return json.dumps([vars(label) for label in labels])
