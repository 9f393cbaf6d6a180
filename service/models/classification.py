"""Reads classifiers from their checkpoints."""

import json

from model import VARIANTS, load_model
from model.checkpoint import Checkpoint, CheckpointError
from model.cost import cost
from service.models.labels import IMAGENET, as_text, choose_labels, read_labels
from service.models.load import Converted, LoadedModel, Loader, both_sides
from service.settings import ModelChoice


def _load(chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None) -> LoadedModel:
    if chosen.resize_mode is not None or chosen.letterbox_size is not None:
        raise CheckpointError(
            f"{checkpoint.path}: a classifier has one way to resize; resize_mode and "
            "letterbox_size are for detectors"
        )
    network = load_model(checkpoint, variant, both_sides(chosen.image_size))
    config, of_image = network.config, cost(network)
    return LoadedModel(
        name=chosen.name or config.name,
        version=chosen.version,
        task="classify",
        labels=choose_labels(chosen.labels, checkpoint, config.num_classes, IMAGENET),
        config=config,
        network=network,
        parameters=of_image.parameters,
        source=checkpoint.path,
        image_size=config.image_size,
        flops=of_image.flops,
    )


def _convert(chosen: ModelChoice, checkpoint: Checkpoint) -> Converted:
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
        labels = as_text(read_labels(chosen.labels, config.num_classes))
    return Converted(network, facts if labels is None else {**facts, "labels": labels})


# Whatever no other task recognises is taken for a classifier, whose loader then says what it is.
CLASSIFICATION = Loader("classify", VARIANTS, lambda _: True, _load, _convert)
