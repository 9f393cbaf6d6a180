"""The official state dicts of detectors: the only file that knows their names.

Their weights are folded as those of the classifiers are (see `model.official`), and

- the BatchNorm after a convolution of a cascade's box head is part of the convolution;
- the first linear layer of a box head reads its features channels-last;
- the transposed convolution of a mask head is a linear layer.

Names and shapes are those of github.com/LeapLabTHU/DAT-Detection (commit 4d4023d) with
mmdetection 2.26.0.
"""

from collections.abc import Iterator

from torch import Tensor

from model.detection.anchors import RETINANET_ANCHORS, RPN_ANCHORS
from model.detection.config import DetectorConfig
from model.detection.roi_heads import BOX_BINS
from model.official import Rule, Shapes, State, flatten, layer, sources, unwrapped
from model.openmmlab import backbone_rules, convolution_norm_rules, pyramid_rules


def is_detector(state: State) -> bool:
    """Whether a state dict, official or our own, is of a detector."""
    return any(name.startswith("backbone.") for name in unwrapped(state))


def official_shapes(config: DetectorConfig) -> Shapes:
    """The parameters of an official checkpoint of this detector, by official name."""
    return sources(rules(config))


def num_classes(state: State) -> int | None:
    """How many classes a state dict, official or our own, tells apart; `None` if it has no head."""
    for name, per_class, others in (
        ("bbox_head.retina_cls.bias", RETINANET_ANCHORS.per_cell, 0),
        ("roi_head.bbox_head.fc_cls.bias", 1, 1),
        ("roi_head.bbox_head.0.fc_cls.bias", 1, 1),
        ("head.classes.bias", RETINANET_ANCHORS.per_cell, 0),
        ("head.box_heads.0.classes.bias", 1, 1),
    ):
        if name in state and state[name].ndim == 1:
            return max(1, len(state[name]) // per_class - others)
    return None


def rules(config: DetectorConfig) -> Iterator[Rule]:
    """How the weights come from those of an official checkpoint."""
    yield from backbone_rules(config.backbone, config.first_stage)
    yield from _pyramid(config)
    if config.kind == "retinanet":
        yield from _retinanet(config)
        return
    yield from _proposals(config)
    for index in range(config.refinements):
        number = f".{index}" if config.kind == "cascade_mask_rcnn" else ""
        yield from _box_head(config, f"head.box_heads.{index}", f"roi_head.bbox_head{number}")
        yield from _mask_head(config, f"head.mask_heads.{index}", f"roi_head.mask_head{number}")


def _pyramid(config: DetectorConfig) -> Iterator[Rule]:
    dims = [stage.dim for stage in config.backbone.stages[config.first_stage :]]
    yield from pyramid_rules("fpn", dims, config.channels)
    for index in range(config.extra_convolutions):
        before = config.channels if index else dims[-1]
        source = f"neck.fpn_convs.{len(dims) + index}.conv"
        yield from layer(f"fpn.extra.{index}", source, config.channels, before, 3, 3)


def _convolution(
    config: DetectorConfig, target: str, source: str, outputs: int | None = None
) -> Iterator[Rule]:
    yield from layer(target, source, outputs or config.channels, config.channels, 3, 3)


def _retinanet(config: DetectorConfig) -> Iterator[Rule]:
    for ours, official in (("class_tower", "cls_convs"), ("box_tower", "reg_convs")):
        for index in range(4):
            yield from _convolution(
                config, f"head.{ours}.{index}", f"bbox_head.{official}.{index}.conv"
            )
    anchors = RETINANET_ANCHORS.per_cell
    yield from _convolution(
        config, "head.classes", "bbox_head.retina_cls", anchors * config.num_classes
    )
    yield from _convolution(config, "head.boxes", "bbox_head.retina_reg", anchors * 4)


def _proposals(config: DetectorConfig) -> Iterator[Rule]:
    anchors = RPN_ANCHORS.per_cell
    yield from _convolution(config, "head.rpn.conv", "rpn_head.rpn_conv")
    for ours, official, outputs in (
        ("objectness", "rpn_cls", anchors),
        ("boxes", "rpn_reg", 4 * anchors),
    ):
        source = f"rpn_head.{official}"
        yield from layer(f"head.rpn.{ours}", source, outputs, config.channels, 1, 1, fold=flatten)


def _box_head(config: DetectorConfig, target: str, source: str) -> Iterator[Rule]:
    cascade = config.kind == "cascade_mask_rcnn"
    shape = config.channels, config.channels, 3, 3
    for index in range(4 if cascade else 0):
        yield from convolution_norm_rules(
            f"{target}.tower.{index}", f"{source}.shared_convs.{index}", *shape
        )
    linear = f"{source}.shared_fcs"
    yield from layer(
        f"{target}.hidden.0",
        f"{linear}.0",
        config.hidden,
        config.channels * BOX_BINS**2,
        fold=_channels_last,
    )
    if not cascade:
        yield from layer(f"{target}.hidden.1", f"{linear}.1", config.hidden, config.hidden)
    yield from layer(f"{target}.classes", f"{source}.fc_cls", config.num_classes + 1, config.hidden)
    yield from layer(f"{target}.boxes", f"{source}.fc_reg", 4 * config.num_classes, config.hidden)


def _channels_last(weight: Tensor) -> Tensor:
    """A linear layer over features `(C, 7, 7)`, for features `(7, 7, C)`."""
    return weight.unflatten(1, (-1, BOX_BINS**2)).transpose(1, 2).flatten(1)


def _mask_head(config: DetectorConfig, target: str, source: str) -> Iterator[Rule]:
    for index in range(4):
        yield from _convolution(config, f"{target}.tower.{index}", f"{source}.convs.{index}.conv")
    yield Rule(
        f"{target}.upsample.weight",
        {f"{source}.upsample.weight": (config.channels, config.channels, 2, 2)},
        lambda weight: weight.permute(2, 3, 1, 0).flatten(0, 2),
    )
    yield Rule(
        f"{target}.upsample.bias",
        {f"{source}.upsample.bias": (config.channels,)},
        lambda bias: bias.repeat(4),
    )
    yield from layer(
        f"{target}.classes",
        f"{source}.conv_logits",
        config.num_classes,
        config.channels,
        1,
        1,
        fold=flatten,
    )
