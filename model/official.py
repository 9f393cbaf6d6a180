"""The official state dicts: the only file that knows their names.

Official weights are folded once, in float64, into the exact form that the modules compute with:

- queries are scaled by `head_dim ** -0.5`, the offset network (which reads them) by its inverse;
- keys and values of deformable attention are one projection; the bias of the keys is dropped,
  which softmax cannot see; the bias of the values moves through the output projection;
- `x + depthwise(x)` is one depthwise convolution with 1 added to its centre tap;
- 1x1 convolutions are linear layers.

Names and shapes are those of github.com/LeapLabTHU/DAT (v1: commit 797f187, DAT++: 32173fc).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.config import DatConfig

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

_BUFFERS = ("relative_position_index", "attn_mask")  # stored officially, derived here
# Of distributed and of compiled models, before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_AVERAGED_COUNT = "n_averaged"  # beside the weights of torch's own averaged models


def is_official(state: Mapping[str, object]) -> bool:
    """Whether a state dict uses the official names."""
    return "patch_proj.0.weight" in state


def unwrapped(state: State) -> dict[str, Tensor]:
    """A state dict without what wrappers of the model put before every name."""
    given = {key: tensor for key, tensor in state.items() if key != _AVERAGED_COUNT}
    while given and (
        prefix := next(
            (one for one in _WRAPPERS if all(key.startswith(one) for key in given)), None
        )
    ):
        given = {key.removeprefix(prefix): tensor for key, tensor in given.items()}
    return given


def parameters(state: State) -> dict[str, Tensor]:
    """The official parameters, without wrappers and the buffers that our modules derive."""
    return {key: tensor for key, tensor in unwrapped(state).items() if not key.endswith(_BUFFERS)}


def position_table(state: State, stage: int, block: int) -> Tensor | None:
    """The relative position table of a block, by its official name or by ours."""
    names = (
        f"stages.{stage}.attns.{block}.rpe_table",
        f"stages.{stage}.attns.{block}.relative_position_bias_table",
        f"stages.{stage}.blocks.{block}.attention.relative_position_bias_table",
    )
    return next((state[name] for name in names if name in state), None)


def official_shapes(config: DatConfig) -> Shapes:
    """The parameters of an official checkpoint of this variant, by official name."""
    return sources(_rules(config))


def fold(state: State, config: DatConfig) -> dict[str, Tensor]:
    """This repository's state dict, float64, from the parameters of an official one.

    The names and shapes must be those of `official_shapes`.
    """
    return apply(_rules(config), state)


def own_shapes(config: DatConfig) -> Shapes:
    """The parameters of this repository's own network of this variant, by name."""
    return targets(_rules(config))


@dataclass(frozen=True)
class Rule:
    """How one of our tensors comes from official ones.

    Attributes:
        target: our name.
        sources: official names with their shapes, in the order of `fold`'s arguments.
        fold: official tensors in float64 to ours.
    """

    target: str
    sources: Shapes
    fold: Callable[..., Tensor]


def sources(rules: Iterable[Rule]) -> Shapes:
    """The official tensors that rules read, by name."""
    return {source: shape for rule in rules for source, shape in rule.sources.items()}


def targets(rules: Iterable[Rule]) -> Shapes:
    """The shapes of our own tensors that rules make, by name."""
    rules = list(rules)
    given = {name: torch.empty(*shape, device="meta") for name, shape in sources(rules).items()}
    return {name: tuple(tensor.shape) for name, tensor in apply(rules, given).items()}


def apply(rules: Iterable[Rule], state: State) -> dict[str, Tensor]:
    """What rules make of official tensors, float64, by our names."""
    return {
        rule.target: rule.fold(*(state[source].double() for source in rule.sources))
        for rule in rules
    }


def as_is(tensor: Tensor) -> Tensor:
    """The fold of a tensor that stays what it is."""
    return tensor


def flatten(weight: Tensor) -> Tensor:
    """The fold of a 1x1 convolution to a linear layer."""
    return weight.flatten(1)


def _with_centre_tap(weight: Tensor) -> Tensor:
    folded = weight.clone()
    folded[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    return folded


def _scaled_queries(scale: float) -> Callable[[Tensor], Tensor]:
    """Scale the first third of a fused (q, k, v) tensor."""

    def fold(tensor: Tensor) -> Tensor:
        q, rest = tensor.split((len(tensor) // 3, 2 * len(tensor) // 3))
        return torch.cat((q * scale, rest))

    return fold


def affine(target: str, source: str, size: int) -> Iterator[Rule]:
    """A LayerNorm or the bias and weight of one."""
    for part in ("weight", "bias"):
        yield Rule(f"{target}.{part}", {f"{source}.{part}": (size,)}, as_is)


def layer(
    target: str,
    source: str,
    *shape: int,
    bias: bool = True,
    fold: Callable[[Tensor], Tensor] = as_is,
) -> Iterator[Rule]:
    """A linear layer or a convolution with the official weight shape."""
    yield Rule(f"{target}.weight", {f"{source}.weight": shape}, fold)
    if bias:
        yield Rule(f"{target}.bias", {f"{source}.bias": shape[:1]}, as_is)


def _rules(config: DatConfig) -> Iterator[Rule]:
    dim = config.stages[-1].dim
    yield from trunk_rules(config)
    yield from affine("norm", "cls_norm.norm", dim)
    yield from layer("head", "cls_head", config.num_classes, dim)


def trunk_rules(config: DatConfig) -> Iterator[Rule]:
    """How stem and stages come from the official ones."""
    dims = [stage.dim for stage in config.stages]
    yield from _stem(config, dims[0])
    for index, stage in enumerate(config.stages):
        for block, kind in enumerate(stage.blocks):
            yield from block_rules(config, index, block, kind)
    kernel = 2 if config.family == "dat" else 3
    for index, (before, after) in enumerate(pairwise(dims)):
        target, source = f"downsamples.{index}", f"down_projs.{index}"
        yield from layer(f"{target}.conv", f"{source}.0", after, before, kernel, kernel, bias=False)
        yield from affine(f"{target}.norm", f"{source}.1.norm", after)


def _stem(config: DatConfig, dim: int) -> Iterator[Rule]:
    convolutions = (
        [(0, 3, dim, 4)]
        if config.family == "dat"
        else [
            (0, 3, dim // 2, 3),
            (3, dim // 2, dim, 3),
        ]
    )
    for position, (index, before, after, kernel) in enumerate(convolutions):
        target = f"stem.{2 * position}"
        yield from layer(f"{target}.conv", f"patch_proj.{index}", after, before, kernel, kernel)
        yield from affine(f"{target}.norm", f"patch_proj.{index + 1}.norm", after)


def block_rules(config: DatConfig, stage: int, block: int, kind: str) -> Iterator[Rule]:
    """How one block comes from its official parts."""
    target, source = f"stages.{stage}.blocks.{block}", f"stages.{stage}"
    dim = config.stages[stage].dim
    for position in (0, 1):
        norm = f"{source}.layer_norms.{2 * block + position}.norm"
        yield from affine(f"{target}.norm{position + 1}", norm, dim)
    names = f"{target}.attention", f"{source}.attns.{block}"
    if kind == "D":
        yield from _deformable(config, stage, *names)
    elif kind == "Q":
        yield from _deformable_detr(config, stage, *names)
    else:
        yield from _local(config, stage, kind, *names)
    mlp = f"{source}.mlps.{block}"
    if config.family == "dat":
        yield from layer(f"{target}.mlp.fc1", f"{mlp}.chunk.linear1", 4 * dim, dim)
        yield from layer(f"{target}.mlp.fc2", f"{mlp}.chunk.linear2", dim, 4 * dim)
        return
    yield from layer(f"{target}.mlp.fc1", f"{mlp}.linear1.0", 4 * dim, dim, 1, 1, fold=flatten)
    yield from layer(f"{target}.mlp.fc2", f"{mlp}.linear2.0", dim, 4 * dim, 1, 1, fold=flatten)
    for ours, official, channels in (
        ("mlp.dwconv", f"{mlp}.dwc", 4 * dim),
        ("lpu", f"{source}.local_perception_units.{block}", dim),
    ):
        yield from layer(f"{target}.{ours}", official, channels, 1, 3, 3, fold=_with_centre_tap)


def _local(config: DatConfig, stage: int, kind: str, target: str, source: str) -> Iterator[Rule]:
    spec, side = config.stages[stage], 2 * config.window - 1
    scale = (spec.dim // spec.heads) ** -0.5
    if kind == "N":
        qkv, proj = "qkv", "proj"
        table: Shapes = {f"{source}.rpb": (spec.heads, side, side)}
    else:
        qkv, proj = "proj_qkv", "proj_out"
        table = {f"{source}.relative_position_bias_table": (side * side, spec.heads)}
    fold = _scaled_queries(scale)
    yield Rule(f"{target}.qkv.weight", {f"{source}.{qkv}.weight": (3 * spec.dim, spec.dim)}, fold)
    yield Rule(f"{target}.qkv.bias", {f"{source}.{qkv}.bias": (3 * spec.dim,)}, fold)
    yield from layer(f"{target}.proj", f"{source}.{proj}", spec.dim, spec.dim)
    yield Rule(f"{target}.relative_position_bias_table", table, as_is)


def _deformable(config: DatConfig, stage: int, target: str, source: str) -> Iterator[Rule]:
    spec = config.stages[stage]
    scale = (spec.dim // spec.heads) ** -0.5
    channels, kernel, square = (
        spec.dim // spec.offset_groups,
        spec.offset_kernel,
        (spec.dim, spec.dim, 1, 1),
    )
    height, width = config.map_size(stage, (config.table_size, config.table_size))

    def parameter(name: str, *shape: int) -> Shapes:
        return {f"{source}.{name}": shape}

    yield Rule(
        f"{target}.q.weight", parameter("proj_q.weight", *square), lambda w: w.flatten(1) * scale
    )
    yield Rule(f"{target}.q.bias", parameter("proj_q.bias", spec.dim), lambda b: b * scale)
    yield Rule(
        f"{target}.kv.weight",
        parameter("proj_k.weight", *square) | parameter("proj_v.weight", *square),
        lambda k, v: torch.cat((k, v)).flatten(1),
    )
    yield Rule(f"{target}.proj.weight", parameter("proj_out.weight", *square), flatten)
    yield Rule(
        f"{target}.proj.bias",
        parameter("proj_out.bias", spec.dim)
        | parameter("proj_out.weight", *square)
        | parameter("proj_v.bias", spec.dim)
        | parameter("proj_k.bias", spec.dim),
        lambda bias, weight, v_bias, _: bias + weight.flatten(1) @ v_bias,
    )
    yield Rule(
        f"{target}.offset_conv.weight",
        parameter("conv_offset.0.weight", channels, 1, kernel, kernel),
        lambda w: w / scale,
    )
    yield Rule(f"{target}.offset_conv.bias", parameter("conv_offset.0.bias", channels), as_is)
    yield from affine(f"{target}.offset_norm", f"{source}.conv_offset.1.norm", channels)
    yield Rule(
        f"{target}.offset_proj.weight",
        parameter("conv_offset.3.weight", 2, channels, 1, 1),
        flatten,
    )
    yield Rule(
        f"{target}.relative_position_bias_table",
        parameter("rpe_table", spec.heads, 2 * height - 1, 2 * width - 1),
        as_is,
    )


def _deformable_detr(config: DatConfig, stage: int, target: str, source: str) -> Iterator[Rule]:
    """Under the names of Deformable DETR's own layer (`MSDeformAttn`)."""
    spec = config.stages[stage]
    points = spec.heads * spec.points
    for ours, official, outputs in (
        ("offset_proj", "sampling_offsets", 2 * points),
        ("weight_proj", "attention_weights", points),
        ("value_proj", "value_proj", spec.dim),
        ("proj", "output_proj", spec.dim),
    ):
        yield from layer(f"{target}.{ours}", f"{source}.{official}", outputs, spec.dim)
