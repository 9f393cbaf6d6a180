"""From a choice in the settings to a model with its weights, whatever its task."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, CheckpointError
from service.models.card import Label, ModelCard
from service.settings.model import ModelChoice, ResizeMode

_DEMO = Path(__file__).parent.parent.parent / "demo"
BUNDLED = {
    "dat_nano": _DEMO / "dat_nano.safetensors",
    "mask_rcnn_dat_nano": _DEMO / "detection" / "mask_rcnn_dat_nano.safetensors",
    "semantic_fpn_dat_nano": _DEMO / "segmentation" / "semantic_fpn_dat_nano.safetensors",
    "swin_nano": _DEMO / "swin_nano.safetensors",
}
_DEFAULT = "dat_nano"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its weights, on the CPU, and how answers name things.

    Attributes:
        name: that requests use.
        version: shown in every answer.
        task: what it does.
        labels: one for each class, in order of the class index.
        config: what the network is made of.
        network: with its weights, in evaluation mode.
        parameters: as published for the variant.
        source: the file that the weights came from.
        image_size: as in `ModelCard`.
        flops: as in `ModelCard`.
        resize_mode: as in `ModelCard`.
        letterbox_size: as in `ModelCard`.
    """

    name: str
    version: str
    task: str
    labels: tuple[Label, ...]
    config: Any
    network: nn.Module
    parameters: int
    source: Path
    image_size: tuple[int, int] | None = None
    flops: int | None = None
    resize_mode: ResizeMode | None = None
    letterbox_size: int | None = None

    def card(
        self, *, device: str, dtype: str, max_batch: int, buckets: tuple[int, ...]
    ) -> ModelCard:
        """What a caller may know of the model on its device."""
        return ModelCard(
            name=self.name,
            version=self.version,
            task=self.task,
            variant=self.config.name,
            image_size=self.image_size,
            resize_mode=self.resize_mode,
            letterbox_size=self.letterbox_size,
            classes=len(self.labels),
            parameters=self.parameters,
            flops=self.flops,
            device=device,
            dtype=dtype,
            max_batch=max_batch,
            buckets=buckets,
        )


@dataclass(frozen=True)
class Converted:
    """What a file with all that is known of a model holds.

    Attributes:
        state: the weights, by name.
        facts: by name, as text.
    """

    state: Mapping[str, Tensor]
    facts: dict[str, str]


@dataclass(frozen=True)
class Loader:
    """How the models of one task are read.

    Attributes:
        task: its name.
        variants: names of its networks.
        recognises: whether a checkpoint is of this task, by what it holds.
        load: the model of a choice, from its checkpoint and the name of its variant.
        convert: the same model as a converted file keeps it.
    """

    task: str
    variants: Collection[str]
    recognises: Callable[[Checkpoint], bool]
    load: Callable[[ModelChoice, Checkpoint, str | None], LoadedModel]
    convert: Callable[[ModelChoice, Checkpoint], Converted]


def choose_loader(loaders: Sequence[Loader], checkpoint: Checkpoint, variant: str | None) -> Loader:
    """The loader of a checkpoint: by the variant that was named, else by what it holds.

    Raises:
        CheckpointError: no task has such a variant, or recognises the checkpoint.
    """
    for loader in loaders:
        if variant in loader.variants if variant is not None else loader.recognises(checkpoint):
            return loader
    if variant is not None:
        raise CheckpointError(_unknown(loaders, variant))
    raise CheckpointError(f"{checkpoint.path}: no task of this server has a model like this one")


def load(chosen: ModelChoice, loaders: Sequence[Loader]) -> LoadedModel:
    """Read the weights and the class names.

    Raises:
        CheckpointError: the checkpoint cannot be used; the message says which file, which key
            and what was expected.
    """
    known = {variant for loader in loaders for variant in loader.variants}
    variant = chosen.variant or (chosen.name if chosen.name in known else None)
    path = chosen.checkpoint
    if path is None:
        variant = variant or (_DEFAULT if chosen.name is None else None)
        path = _bundled(loaders, variant, chosen.name)
    if chosen.sha256 is not None:
        _check_sha256(path, chosen.sha256.lower())
    checkpoint = checkpoints.read(path, ema=chosen.weights == "ema")
    return choose_loader(loaders, checkpoint, variant).load(chosen, checkpoint, variant)


def _bundled(loaders: Sequence[Loader], variant: str | None, name: str | None) -> Path:
    if variant is None:
        raise CheckpointError(
            f"{name}: no checkpoint is given, and this is none of the bundled models, "
            f"{', '.join(BUNDLED)}"
        )
    if variant in BUNDLED:
        return BUNDLED[variant]
    if not any(variant in loader.variants for loader in loaders):
        raise CheckpointError(_unknown(loaders, variant))
    raise CheckpointError(
        f"{variant} has no bundled weights: give a checkpoint (DAT_MODEL__CHECKPOINT)"
    )


def _unknown(loaders: Sequence[Loader], variant: str | None) -> str:
    known = ", ".join(variant for loader in loaders for variant in loader.variants)
    return f"no variant {variant!r}; there are {known}"


def _check_sha256(path: Path, expected: str) -> None:
    found = checkpoints.sha256(path)
    if found != expected:
        raise CheckpointError(f"{path}: has the SHA-256 {found}, expected {expected}")
