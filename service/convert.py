"""Turns any readable checkpoint into one file that holds all that is known of the model."""

import json
from pathlib import Path

from model import checkpoint as checkpoints
from model import load_model
from model.checkpoint import CheckpointError
from service.served_model import both_sides, read_labels
from service.settings import ModelChoice


def convert(chosen: ModelChoice, out: Path) -> dict[str, str]:
    """Write the folded weights of a model to a `.safetensors` file.

    Returns:
        What was written beside the weights: variant, sizes, classes, and where they came from.

    Raises:
        CheckpointError: the checkpoint or the label file cannot be used, or `out` not written.
    """
    if chosen.checkpoint is None:
        raise CheckpointError("no checkpoint to convert")
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: the file to write must end in .safetensors")
    checkpoint = checkpoints.read(chosen.checkpoint)
    network = load_model(checkpoint, chosen.variant, both_sides(chosen.image_size))
    config = network.config
    labels = checkpoint.metadata.get("labels")
    if chosen.labels is not None:
        named = read_labels(chosen.labels, config.num_classes)
        labels = json.dumps([vars(label) for label in named])
    metadata = {
        "variant": config.name,
        "image_size": json.dumps(config.image_size),
        "table_size": json.dumps(config.table_size),
        "window": json.dumps(config.window),
        "classes": json.dumps(config.num_classes),
        "source": chosen.checkpoint.name,
        "source_sha256": checkpoints.sha256(chosen.checkpoint),
        **({"labels": labels} if labels is not None else {}),
    }
    checkpoints.write(out, network.state_dict(), metadata)
    return metadata
