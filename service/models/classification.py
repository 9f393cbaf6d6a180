"""Reads classifiers from their checkpoints."""

import json
from dataclasses import replace

from model import VARIANTS, load_model
from model.checkpoint import Checkpoint, CheckpointError
from model.cost import cost, flops
from model.swin import create_swin, is_swin, parameters, read_swin
from model.swin_config import SWINS
from service.models.labels import IMAGENET, as_text, choose_labels, read_labels
from service.models.load import Converted, LoadedModel, Loader
from service.settings.model import ModelChoice


def _load(chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None) -> LoadedModel:
    if chosen.resize_mode is not None or chosen.letterbox_size is not None:
        raise CheckpointError(
            f"{checkpoint.path}: a classifier has one way to resize; resize_mode and "
            "letterbox_size are for detectors"
        )
    if is_swin(checkpoint):
        return _load_swin(chosen, checkpoint, variant)
    _refuse_swin(checkpoint, variant)
    network = load_model(checkpoint, variant, chosen.image_size)
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


def _load_swin(chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None) -> LoadedModel:
    file = read_swin(checkpoint, variant, chosen.image_size)
    config = file.config
    try:
        network = create_swin(config, file.state)
    except CheckpointError as fault:
        raise CheckpointError(f"{checkpoint.path}: {fault}") from fault
    named = checkpoint
    if file.labels is not None:
        named = replace(checkpoint, metadata={**checkpoint.metadata, "labels": file.labels})
    return LoadedModel(
        name=chosen.name or config.name,
        version=chosen.version,
        task="classify",
        labels=choose_labels(chosen.labels, named, config.num_classes, IMAGENET),
        config=config,
        network=network,
        parameters=parameters(config),
        source=checkpoint.path,
        image_size=config.image_size,
        flops=flops(config),
    )


def _convert(chosen: ModelChoice, checkpoint: Checkpoint) -> Converted:
    size = chosen.image_size
    if is_swin(checkpoint):
        file = read_swin(checkpoint, chosen.variant, size)
        return Converted(file.state, _labelled(chosen, file.config.num_classes, file.facts))
    _refuse_swin(checkpoint, chosen.variant)
    network = load_model(checkpoint, chosen.variant, size)
    config = network.config
    facts = {
        "variant": config.name,
        "image_size": json.dumps(config.image_size),
        "table_size": json.dumps(config.table_size),
        "window": json.dumps(config.window),
        "classes": json.dumps(config.num_classes),
    }
    labels = checkpoint.metadata.get("labels")
    if labels is not None:
        facts["labels"] = labels
    return Converted(network.state_dict(), _labelled(chosen, config.num_classes, facts))


def _refuse_swin(checkpoint: Checkpoint, variant: str | None) -> None:
    if variant in SWINS:
        raise CheckpointError(f"{checkpoint.path}: holds no Swin of transformers")


def _labelled(chosen: ModelChoice, classes: int, facts: dict[str, str]) -> dict[str, str]:
    """The facts with the names of the classes that the settings give, if they do."""
    if chosen.labels is None:
        return facts
    return {**facts, "labels": as_text(read_labels(chosen.labels, classes))}


# Whatever no other task recognises is taken for a classifier, whose loader then says what it is.
CLASSIFICATION = Loader("classify", (*VARIANTS, *SWINS), lambda _: True, _load, _convert)
