"""Reading weights: official DAT checkpoints, and this repository's own safetensors files.

The only file that knows the official names. Official weights are folded once, in float64, into
the exact form that the modules compute with:

- queries are scaled by `head_dim ** -0.5`, the offset network (which reads them) by its inverse;
- keys and values of deformable attention are one projection; the bias of the keys is dropped,
  which softmax cannot see; the bias of the values moves through the output projection;
- `x + depthwise(x)` is one depthwise convolution with 1 added to its centre tap;
- 1x1 convolutions are linear layers.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import DatConfig

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
_BUFFERS = ("relative_position_index", "attn_mask")  # stored officially, derived here


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message names the file, the key and the expectation."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights as read from a file.

    Attributes:
        state: the state dict, official or this repository's own.
        metadata: facts stored beside the weights, by name.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def labels(self) -> list[str] | None:
        """Class names stored beside the weights, in order of the class index."""
        stored = self.metadata.get("labels")
        return None if stored is None else json.loads(stored)


def read(path: Path) -> Checkpoint:
    """Read a `.safetensors` file or an official `.pth` without executing anything in it.

    Raises:
        CheckpointError: the file is missing, damaged, or holds no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return Checkpoint(state, dict(file.metadata() or {}))
        # The official training loop pickles its configuration beside the weights. Read as a
        # plain dictionary, it needs no foreign class and nothing of it runs.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:
        # Both readers raise whatever their parsers meet in a damaged or hostile file.
        raise CheckpointError(f"{path}: not a readable checkpoint: {cause}") from cause
    stored = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(stored, dict) or not all(isinstance(v, Tensor) for v in stored.values()):
        raise CheckpointError(f"{path}: holds no state dict")
    return Checkpoint(dict(stored))


def is_official(state: State) -> bool:
    """Whether a state dict uses the official names."""
    return "patch_proj.0.weight" in state


def head_classes(state: State) -> int | None:
    """How many classes the head of a state dict has, or `None` without a head."""
    head = state.get("cls_head.weight", state.get("head.weight"))
    return len(head) if head is not None and head.ndim == 2 else None


def official_shapes(config: DatConfig) -> Shapes:
    """The parameters of an official checkpoint of this variant, by official name."""
    return {source: shape for rule in _rules(config) for source, shape in rule.sources.items()}


def fold_official(state: State, config: DatConfig) -> dict[str, Tensor]:
    """This repository's state dict, float64, from an official one.

    Raises:
        CheckpointError: keys are missing, unexpected or misshapen; the message names them.
    """
    expected = official_shapes(config)
    given = {key: tensor for key, tensor in state.items() if not key.endswith(_BUFFERS)}
    faults = [f"missing {key} {shape}" for key, shape in expected.items() if key not in given]
    faults += [f"unexpected {key}" for key in given if key not in expected]
    faults += [
        f"{key} has shape {tuple(tensor.shape)}, expected {expected[key]}"
        for key, tensor in given.items()
        if key in expected and tuple(tensor.shape) != expected[key]
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError(f"not a checkpoint of {config.name}: {shown}")
    return {
        rule.target: rule.fold(*(given[source].double() for source in rule.sources))
        for rule in _rules(config)
    }


@dataclass(frozen=True)
class _Rule:
    """How one of our tensors comes from official ones.

    Attributes:
        target: our name.
        sources: official names with their shapes, in the order of `fold`'s arguments.
        fold: official tensors in float64 to ours.
    """

    target: str
    sources: Shapes
    fold: Callable[..., Tensor]


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _flatten(weight: Tensor) -> Tensor:
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


def _affine(target: str, source: str, size: int) -> Iterator[_Rule]:
    """A LayerNorm or the bias and weight of one."""
    for part in ("weight", "bias"):
        yield _Rule(f"{target}.{part}", {f"{source}.{part}": (size,)}, _as_is)


def _layer(
    target: str,
    source: str,
    *shape: int,
    bias: bool = True,
    fold: Callable[[Tensor], Tensor] = _as_is,
) -> Iterator[_Rule]:
    """A linear layer or a convolution with the official weight shape."""
    yield _Rule(f"{target}.weight", {f"{source}.weight": shape}, fold)
    if bias:
        yield _Rule(f"{target}.bias", {f"{source}.bias": shape[:1]}, _as_is)


def _rules(config: DatConfig) -> Iterator[_Rule]:
    dims = [stage.dim for stage in config.stages]
    yield from _stem(config, dims[0])
    for index, stage in enumerate(config.stages):
        for block, kind in enumerate(stage.blocks):
            yield from _block(config, index, block, kind)
    kernel = 2 if config.family == "dat" else 3
    for index, (before, after) in enumerate(pairwise(dims)):
        target, source = f"downsamples.{index}", f"down_projs.{index}"
        yield from _layer(
            f"{target}.conv", f"{source}.0", after, before, kernel, kernel, bias=False
        )
        yield from _affine(f"{target}.norm", f"{source}.1.norm", after)
    yield from _affine("norm", "cls_norm.norm", dims[-1])
    yield from _layer("head", "cls_head", config.num_classes, dims[-1])


def _stem(config: DatConfig, dim: int) -> Iterator[_Rule]:
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
        yield from _layer(f"{target}.conv", f"patch_proj.{index}", after, before, kernel, kernel)
        yield from _affine(f"{target}.norm", f"patch_proj.{index + 1}.norm", after)


def _block(config: DatConfig, stage: int, block: int, kind: str) -> Iterator[_Rule]:
    target, source = f"stages.{stage}.blocks.{block}", f"stages.{stage}"
    dim = config.stages[stage].dim
    for position in (0, 1):
        norm = f"{source}.layer_norms.{2 * block + position}.norm"
        yield from _affine(f"{target}.norm{position + 1}", norm, dim)
    names = f"{target}.attention", f"{source}.attns.{block}"
    yield from (
        _deformable(config, stage, *names) if kind == "D" else _local(config, stage, kind, *names)
    )
    mlp = f"{source}.mlps.{block}"
    if config.family == "dat":
        yield from _layer(f"{target}.mlp.fc1", f"{mlp}.chunk.linear1", 4 * dim, dim)
        yield from _layer(f"{target}.mlp.fc2", f"{mlp}.chunk.linear2", dim, 4 * dim)
        return
    yield from _layer(f"{target}.mlp.fc1", f"{mlp}.linear1.0", 4 * dim, dim, 1, 1, fold=_flatten)
    yield from _layer(f"{target}.mlp.fc2", f"{mlp}.linear2.0", dim, 4 * dim, 1, 1, fold=_flatten)
    for ours, official, channels in (
        ("mlp.dwconv", f"{mlp}.dwc", 4 * dim),
        ("lpu", f"{source}.local_perception_units.{block}", dim),
    ):
        yield from _layer(f"{target}.{ours}", official, channels, 1, 3, 3, fold=_with_centre_tap)


def _local(config: DatConfig, stage: int, kind: str, target: str, source: str) -> Iterator[_Rule]:
    spec, side = config.stages[stage], 2 * config.window - 1
    scale = (spec.dim // spec.heads) ** -0.5
    if kind == "N":
        qkv, proj = "qkv", "proj"
        table: Shapes = {f"{source}.rpb": (spec.heads, side, side)}
    else:
        qkv, proj = "proj_qkv", "proj_out"
        table = {f"{source}.relative_position_bias_table": (side * side, spec.heads)}
    fold = _scaled_queries(scale)
    yield _Rule(f"{target}.qkv.weight", {f"{source}.{qkv}.weight": (3 * spec.dim, spec.dim)}, fold)
    yield _Rule(f"{target}.qkv.bias", {f"{source}.{qkv}.bias": (3 * spec.dim,)}, fold)
    yield from _layer(f"{target}.proj", f"{source}.{proj}", spec.dim, spec.dim)
    yield _Rule(f"{target}.relative_position_bias_table", table, _as_is)


def _deformable(config: DatConfig, stage: int, target: str, source: str) -> Iterator[_Rule]:
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

    yield _Rule(
        f"{target}.q.weight", parameter("proj_q.weight", *square), lambda w: w.flatten(1) * scale
    )
    yield _Rule(f"{target}.q.bias", parameter("proj_q.bias", spec.dim), lambda b: b * scale)
    yield _Rule(
        f"{target}.kv.weight",
        parameter("proj_k.weight", *square) | parameter("proj_v.weight", *square),
        lambda k, v: torch.cat((k, v)).flatten(1),
    )
    yield _Rule(f"{target}.proj.weight", parameter("proj_out.weight", *square), _flatten)
    yield _Rule(
        f"{target}.proj.bias",
        parameter("proj_out.bias", spec.dim)
        | parameter("proj_out.weight", *square)
        | parameter("proj_v.bias", spec.dim)
        | parameter("proj_k.bias", spec.dim),
        lambda bias, weight, v_bias, _: bias + weight.flatten(1) @ v_bias,
    )
    yield _Rule(
        f"{target}.offset_conv.weight",
        parameter("conv_offset.0.weight", channels, 1, kernel, kernel),
        lambda w: w / scale,
    )
    yield _Rule(f"{target}.offset_conv.bias", parameter("conv_offset.0.bias", channels), _as_is)
    yield from _affine(f"{target}.offset_norm", f"{source}.conv_offset.1.norm", channels)
    yield _Rule(
        f"{target}.offset_proj.weight",
        parameter("conv_offset.3.weight", 2, channels, 1, 1),
        _flatten,
    )
    yield _Rule(
        f"{target}.relative_position_bias_table",
        parameter("rpe_table", spec.heads, 2 * height - 1, 2 * width - 1),
        _as_is,
    )
