"""The official state dicts of segmenters: the only file that knows their names.

Their weights are folded as those of the classifiers are (see `model.official`), and the BatchNorm
after a convolution is part of the convolution. What serves training alone, an auxiliary head, is
left out.

Names and shapes are those of github.com/LeapLabTHU/DAT-Segmentation (commit fdd2039) with
mmsegmentation 0.29.0.
"""

from collections.abc import Iterator

from model.official import Rule, Shapes, State, flatten, layer, sources, unwrapped
from model.openmmlab import backbone_rules, convolution_norm_rules, pyramid_rules
from model.segmentation.config import SEGMENTERS, SegmenterConfig
from model.segmentation.semantic_fpn import DEPTHS
from model.segmentation.upernet import POOLED_SIDES

_HEAD = "decode_head."  # of ours as well


def is_segmenter(state: State) -> bool:
    """Whether a state dict, official or our own, is of a segmenter."""
    return any(name.startswith(_HEAD) for name in unwrapped(state))


def official_shapes(config: SegmenterConfig) -> Shapes:
    """The parameters of an official checkpoint of this segmenter, by official name."""
    return sources(rules(config))


def num_classes(state: State) -> int | None:
    """How many classes a state dict, official or our own, tells apart; `None` if it has no head."""
    for name in (f"{_HEAD}conv_seg.weight", f"{_HEAD}classes.weight"):
        if name in state and state[name].ndim > 1:
            return max(1, len(state[name]))
    return None


def nearest(state: State) -> str | None:
    """The segmenter that an official state dict is of, if it is whole.

    It is known by the head and the width of the last map.
    """
    norm = state.get("backbone.norms.3.norm.weight")
    heads = {"semantic_fpn": f"{_HEAD}scale_heads.", "upernet": f"{_HEAD}psp_modules."}
    return next(
        (
            config.name
            for config in SEGMENTERS.values()
            if any(key.startswith(heads[config.kind]) for key in state)
            and norm is not None
            and norm.shape == config.dims[-1:]
        ),
        None,
    )


def rules(config: SegmenterConfig) -> Iterator[Rule]:
    """How the weights come from those of an official checkpoint."""
    yield from backbone_rules(config.backbone, first_stage=0)
    yield from head_rules(config)


def head_rules(config: SegmenterConfig) -> Iterator[Rule]:
    """How what follows the backbone comes from the official neck and head."""
    if config.kind == "semantic_fpn":
        yield from _semantic_fpn(config)
    else:
        yield from _upernet(config)
    shape = config.num_classes, config.channels, 1, 1
    yield from layer(f"{_HEAD}classes", f"{_HEAD}conv_seg", *shape, fold=flatten)


def _semantic_fpn(config: SegmenterConfig) -> Iterator[Rule]:
    yield from pyramid_rules(f"{_HEAD}pyramid", config.dims, config.pyramid_channels)
    for level, depth in enumerate(DEPTHS):
        for index in range(depth):
            before = config.channels if index else config.pyramid_channels
            yield from convolution_norm_rules(
                f"{_HEAD}branches.{level}.{index}",
                # Between two convolutions stands what doubles the map.
                f"{_HEAD}scale_heads.{level}.{2 * index}",
                *(config.channels, before, 3, 3),
            )


def _upernet(config: SegmenterConfig) -> Iterator[Rule]:
    channels = config.channels
    *finer, last = config.dims

    def convolution(target: str, source: str, before: int, side: int) -> Iterator[Rule]:
        shape = channels, before, side, side
        yield from convolution_norm_rules(f"{_HEAD}{target}", f"{_HEAD}{source}", *shape)

    for index in range(len(POOLED_SIDES)):
        yield from convolution(f"pooling.branches.{index}", f"psp_modules.{index}.1", last, 1)
    together = last + len(POOLED_SIDES) * channels
    yield from convolution("pooling.bottleneck", "bottleneck", together, 3)
    for index, dim in enumerate(finer):
        yield from convolution(f"laterals.{index}", f"lateral_convs.{index}", dim, 1)
        yield from convolution(f"outputs.{index}", f"fpn_convs.{index}", channels, 3)
    yield from convolution("fusion", "fpn_bottleneck", len(config.dims) * channels, 3)
