"""What the official checkpoints of detectors and segmenters have in common.

Both were trained with OpenMMLab's code, which keeps `{'meta': ..., 'state_dict': ...}`: the
backbone has a prefix, a pyramid is called `neck`, a BatchNorm follows its convolution under the
name `bn`, and `meta` has the names of the classes. Here are their rules and what becomes of them
(see `model.official`).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.config import DatConfig
from model.official import (
    Rule,
    Shapes,
    State,
    affine,
    apply,
    flatten,
    layer,
    sources,
    targets,
    trunk_rules,
    unwrapped,
)

_AUXILIARY = "auxiliary_head."  # serves training alone
_COUNTER = "num_batches_tracked"  # of a BatchNorm in training
_NORM_EPSILON = 1e-5


class Config(Protocol):
    """Of a network that has a name."""

    @property
    def name(self) -> str:
        """The name."""


C = TypeVar("C", bound=Config)


def is_official(state: Mapping[str, object]) -> bool:
    """Whether a state dict uses the official names."""
    return "backbone.patch_proj.0.weight" in state


def parameters(state: State) -> dict[str, Tensor]:
    """A state dict without wrappers, without counters and without an auxiliary head."""
    return {
        key: tensor
        for key, tensor in unwrapped(state).items()
        if not key.endswith(_COUNTER) and not key.startswith(_AUXILIARY)
    }


def backbone_rules(config: DatConfig, first_stage: int) -> Iterator[Rule]:
    """How the backbone comes from the official one, with the norms of its outputs."""
    for rule in trunk_rules(config):
        named = {f"backbone.{source}": shape for source, shape in rule.sources.items()}
        yield replace(rule, target=f"backbone.{rule.target}", sources=named)
    for index, stage in enumerate(config.stages):
        if index >= first_stage:
            name = f"backbone.norms.{index}"
            yield from affine(name, f"{name}.norm", stage.dim)


def pyramid_rules(target: str, dims: Sequence[int], channels: int) -> Iterator[Rule]:
    """How a pyramid with a level for each of these maps comes from the official one."""
    for index, dim in enumerate(dims):
        lateral = f"neck.lateral_convs.{index}.conv"
        yield from layer(f"{target}.laterals.{index}", lateral, channels, dim, 1, 1, fold=flatten)
        output = f"neck.fpn_convs.{index}.conv"
        yield from layer(f"{target}.outputs.{index}", output, channels, channels, 3, 3)


def convolution_norm_rules(target: str, source: str, *shape: int) -> Iterator[Rule]:
    """How a convolution comes from one without a bias and the BatchNorm after it.

    Args:
        target: our name. A kernel of 1x1 becomes a linear layer.
        source: the official name of the two.
        *shape: of the kernel, `(outputs, inputs, height, width)`.
    """
    outputs = shape[:1]
    scaled: Shapes = {f"{source}.bn.{name}": outputs for name in ("weight", "running_var")}
    moved: Shapes = {f"{source}.bn.{name}": outputs for name in ("bias", "running_mean")}

    def scale(weight: Tensor, variance: Tensor) -> Tensor:
        return weight / (variance + _NORM_EPSILON).sqrt()

    def kernel(weight: Tensor, *norm: Tensor) -> Tensor:
        folded = weight * scale(*norm).view(-1, 1, 1, 1)
        return flatten(folded) if folded.shape[2:] == (1, 1) else folded

    yield Rule(f"{target}.weight", {f"{source}.conv.weight": shape} | scaled, kernel)
    yield Rule(
        f"{target}.bias",
        scaled | moved,
        lambda weight, variance, bias, mean: bias - mean * scale(weight, variance),
    )


def identify(
    given: Checkpoint,
    name: str | None,
    known: Mapping[str, C],
    rules: Callable[[C], Iterable[Rule]],
    kind: str,
) -> C:
    """What a checkpoint is of.

    Args:
        given: the checkpoint.
        name: what it has to be; `None` finds it by what the file says, or by the names and shapes
            of the weights.
        known: all there are, by name, with as many classes as the checkpoint.
        rules: how the weights of one come from official ones.
        kind: what such a network is called.

    Raises:
        CheckpointError: there is no such network, or the checkpoint is of another one or of none.
    """
    if name is not None and name not in known:
        raise CheckpointError(f"no {kind} {name!r}; there are {', '.join(known)}")
    stored = given.metadata.get("variant")
    if stored is not None and (stored not in known or name not in (None, stored)):
        raise CheckpointError(f"{given.path}: holds a {stored}, expected {name or f'a {kind}'}")
    name = name or stored
    if name is not None:
        return known[name]
    shapes = checkpoint.shapes(parameters(given.state))
    fits = _fits_official if is_official(shapes) else _fits_own
    found = next((one for one in known.values() if fits(shapes, list(rules(one)))), None)
    if found is None:
        raise CheckpointError(
            f"{given.path}: fits no {kind}; name one of {', '.join(known)} to see what differs"
        )
    return found


def _fits_official(shapes: Shapes, rules: Sequence[Rule]) -> bool:
    return shapes == sources(rules)


def _fits_own(shapes: Shapes, rules: Sequence[Rule]) -> bool:
    # Names first: to find the shapes takes half a second.
    return shapes.keys() == {rule.target for rule in rules} and shapes == targets(rules)


def translated(state: State, own: State, rules: Sequence[Rule], name: str) -> dict[str, Tensor]:
    """What `own`, the state dict of a network, becomes when `state` is loaded into it.

    Args:
        state: official, or of the network's own names, without wrappers and counters.
        own: names, shapes and types of the network.
        rules: how the network's own come from official ones.
        name: of the network.

    Raises:
        CheckpointError: keys are missing, unexpected or misshapen, or values are not finite
            numbers; the message names them.
    """
    official = is_official(state)
    checkpoint.verify(state, sources(rules) if official else checkpoint.shapes(own), name)
    folded = apply(rules, state) if official else state
    return {key: tensor.to(own[key].dtype) for key, tensor in folded.items()}


def class_names(given: Checkpoint, expected: int) -> tuple[str, ...] | None:
    """The names of the classes, in order of their index, or `None` if the file has none.

    Those of a converted file, or those that OpenMMLab's training stores.

    Raises:
        CheckpointError: names that are not those of the classes.
    """
    if "labels" in given.metadata:
        entries = stored_list(given, "labels")
        stored = [one.get("name") if isinstance(one, dict) else one for one in entries]
        labels = tuple(name for name in stored if isinstance(name, str))
        if not len(labels) == len(entries) == expected:
            raise CheckpointError(f"{given.path}: labels, expected {expected} names")
        return labels
    names = given.meta.get("CLASSES")
    if names is None:
        return None
    if (
        not isinstance(names, (list, tuple))
        or len(names) != expected
        or not all(isinstance(name, str) for name in names)
    ):
        raise CheckpointError(f"{given.path}: meta CLASSES, expected {expected} names")
    return tuple(names)


def stored_list(given: Checkpoint, name: str) -> list[Any]:
    """A list that a converted file keeps as JSON.

    Raises:
        CheckpointError: it is none.
    """
    try:
        entries = json.loads(given.metadata[name].removeprefix("\ufeff"))
    except ValueError as fault:
        raise CheckpointError(f"{given.path}: {name}, expected a JSON list: {fault}") from fault
    if not isinstance(entries, list):
        raise CheckpointError(f"{given.path}: {name}, expected a JSON list")
    return entries
