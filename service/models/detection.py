"""Reads detectors from their checkpoints."""

import json

from model.checkpoint import Checkpoint, CheckpointError
from model.detection import DETECTORS, load_detector
from model.detection.official import is_detector
from service.models.card import Label
from service.models.labels import COCO, as_text, choose_labels, unmarked
from service.models.load import Converted, LoadedModel, Loader
from service.settings.model import ModelChoice


def _load(chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None) -> LoadedModel:
    if chosen.image_size is not None:
        raise CheckpointError(
            f"{checkpoint.path}: a detector takes every image at a size of its own; image_size "
            "is for classifiers"
        )
    loaded = load_detector(checkpoint, variant)
    detector, config = loaded.detector, loaded.detector.config
    # Those of a converted file have more than a name.
    if chosen.labels is None and loaded.labels and "labels" not in checkpoint.metadata:
        labels = unmarked(tuple(map(Label, loaded.labels)))
    else:
        labels = choose_labels(chosen.labels, checkpoint, config.num_classes, COCO)
    return LoadedModel(
        name=chosen.name or config.name,
        version=chosen.version,
        task="detect",
        labels=labels,
        config=config,
        network=detector,
        parameters=sum(parameter.numel() for parameter in detector.parameters()),
        source=checkpoint.path,
        resize_mode=chosen.resize_mode or "official",
        letterbox_size=chosen.letterbox_size or config.letterbox_size,
    )


def _convert(chosen: ModelChoice, checkpoint: Checkpoint) -> Converted:
    loaded = _load(chosen, checkpoint, chosen.variant)
    facts = {
        "variant": loaded.config.name,
        "classes": json.dumps(loaded.config.num_classes),
        "labels": as_text(loaded.labels),
    }
    return Converted(loaded.network.state_dict(), facts)


DETECTION = Loader(
    "detect", DETECTORS, lambda checkpoint: is_detector(checkpoint.state), _load, _convert
)
