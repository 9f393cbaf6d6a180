"""Reads segmenters from their checkpoints."""

import json

from model.checkpoint import Checkpoint, CheckpointError
from model.segmentation import SEGMENTERS, LoadedSegmenter, load_segmenter
from model.segmentation.classes import palette_as_text
from model.segmentation.official import is_segmenter
from service.models.card import Label
from service.models.labels import as_text, choose_labels, unmarked
from service.models.load import Converted, LoadedModel, Loader
from service.settings.model import ModelChoice


def _read(
    chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None
) -> tuple[LoadedSegmenter, tuple[Label, ...]]:
    """The segmenter, and its classes under the names that its file gives them."""
    if chosen.image_size is not None:
        raise CheckpointError(
            f"{checkpoint.path}: a segmenter takes every image at a size of its own; image_size "
            "is for classifiers"
        )
    if chosen.resize_mode is not None or chosen.letterbox_size is not None:
        raise CheckpointError(
            f"{checkpoint.path}: a segmenter has one way to resize; resize_mode and "
            "letterbox_size are for detectors"
        )
    loaded = load_segmenter(checkpoint, variant)
    if chosen.labels is None and loaded.class_names is not None:
        return loaded, unmarked(tuple(map(Label, loaded.class_names)))
    classes = loaded.segmenter.config.num_classes
    return loaded, choose_labels(chosen.labels, checkpoint, classes)


def _load(chosen: ModelChoice, checkpoint: Checkpoint, variant: str | None) -> LoadedModel:
    loaded, labels = _read(chosen, checkpoint, variant)
    segmenter = loaded.segmenter
    return LoadedModel(
        name=chosen.name or segmenter.config.name,
        version=chosen.version,
        task="segment",
        # One name of ADE20K ends with a blank.
        labels=tuple(
            Label(label.name.strip(), label.wnid, colour)
            for label, colour in zip(labels, loaded.palette, strict=True)
        ),
        config=segmenter.config,
        network=segmenter,
        parameters=sum(parameter.numel() for parameter in segmenter.parameters()),
        source=checkpoint.path,
    )


def _convert(chosen: ModelChoice, checkpoint: Checkpoint) -> Converted:
    loaded, labels = _read(chosen, checkpoint, chosen.variant)
    config = loaded.segmenter.config
    facts = {
        "variant": config.name,
        "classes": json.dumps(config.num_classes),
        "labels": as_text(labels),
        "palette": palette_as_text(loaded.palette),
    }
    return Converted(loaded.segmenter.state_dict(), facts)


SEGMENTATION = Loader(
    "segment", SEGMENTERS, lambda checkpoint: is_segmenter(checkpoint.state), _load, _convert
)
