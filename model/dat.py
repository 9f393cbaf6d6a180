"""DAT and DAT++ classifiers for inference: stem, four stages, head, in the order of the papers.

DAT: arXiv:2201.00520 (CVPR 2022); DAT++: arXiv:2309.01430. Numbers are those of the official
code (github.com/LeapLabTHU/DAT), checked by the golden cases in `tests/golden`. Dropout and drop
path do nothing at inference and are not here. `forward` creates nothing from host values and
depends on no data, so it can be captured in a CUDA graph.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from model import checkpoint
from model.attention import Attended, DeformableAttention, DeformableAttentionPP
from model.attention_weights import Asked, AttentionWeights
from model.checkpoint import Checkpoint, CheckpointError
from model.config import VARIANTS, DatConfig
from model.deformable_detr import DeformableDetrAttention
from model.fused import (
    DepthwiseConv,
    Normed,
    Stream,
    add_norm,
    channels_last_tokens,
    convolve,
    convolve_norm,
    convolve_sum_norm,
    keep_kernels_channels_last,
    linear,
    linear_add,
)
from model.kernels import usable
from model.local_attention import NeighborhoodAttention, WindowAttention
from model.no_images import of_no_images
from model.official import is_official, official_shapes

NOTHING: Mapping[int, Asked] = {}


class Explained(NamedTuple):
    """Logits with the sampling locations of the same forward pass.

    Attributes:
        logits: `(B, num_classes)`.
        sampling_locations: for each of `DAT.deformable_layers`, `(B, G, Hk, Wk, 2)`, (y, x), in
            the coordinates of `model.attention`.
        attention: for each layer that was asked about.
    """

    logits: Tensor
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...] = ()


class StageMaps(NamedTuple):
    """What the stages give.

    Attributes:
        maps: `(B, H, W, C)` of every stage.
        sampling_locations: of every deformable layer, as in `Explained`.
        attention: for each layer that was asked about.
    """

    maps: list[Tensor]
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...]


class DeformableLayer(NamedTuple):
    """Where a deformable attention sits: stage and block count from 0."""

    stage: int
    block: int
    attention: DeformableAttention | DeformableDetrAttention


class Trunk(nn.Module):
    """Stem and stages, without a head.

    Attributes:
        config: what it is made of.
        deformable_layers: the deformable attentions, in the order of the forward pass.
    """

    def __init__(self, config: DatConfig) -> None:
        super().__init__()
        self.config = config
        dims = [stage.dim for stage in config.stages]
        self.stem = make_stem(config)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(dims)))
        down = (2, 2, 0) if config.family == "dat" else (3, 2, 1)
        self.downsamples = nn.ModuleList(
            ConvNorm(before, after, *down, bias=False) for before, after in pairwise(dims)
        )
        self.deformable_layers = list(self._deformable_layers())
        keep_kernels_channels_last(self)

    def stage_maps(
        self,
        images: Tensor,
        layers: Sequence[int] = (),
        cells: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> StageMaps:
        """Maps and sampling locations from normalised images `(B, 3, H, W)`.

        Args:
            images: of the size that the model was built for.
            layers: whose attention is asked for, by their index in `deformable_layers`; only
                those of `DeformableAttention`.
            cells: `(B, len(layers), Q)`, int64, of whose queries, as in `Asked`.
            seen: `(B, 2)`, `(H, W)` of the images without padding, pixels; `None` means that they
                have none.

        Raises:
            ValueError: the images are not of the size the model was built for, or not of the type
                or the device of its weights.
        """
        if images.shape[1:] != (3, *self.config.image_size):
            raise ValueError(
                f"{self.config.name} was built for images (B, 3, {self.config.image_size[0]}, "
                f"{self.config.image_size[1]}); got {tuple(images.shape)}"
            )
        weights = next(self.stem.parameters())
        alike = images.dtype == weights.dtype or _autocasts(weights.device.type)
        if images.device != weights.device or not alike:
            raise ValueError(
                f"{self.config.name} has weights in {weights.dtype} on {weights.device}; got "
                f"images in {images.dtype} on {images.device}"
            )
        asked = self._asked(layers, cells, seen)
        maps: list[Tensor] = []
        locations: list[Tensor] = []
        attention: list[AttentionWeights] = []
        tokens = self.stem(channels_last_tokens(images))
        for index, stage in enumerate(self.stages):
            if index:
                tokens = self.downsamples[index - 1](tokens)
            tokens, stage_locations, stage_attention = stage(tokens, asked.get(index, {}))
            maps.append(tokens)
            locations += stage_locations
            attention += stage_attention
        return StageMaps(maps, tuple(locations), tuple(attention))

    def _asked(
        self, layers: Sequence[int], cells: Tensor | None, seen: Tensor | None
    ) -> dict[int, dict[int, Asked]]:
        """What is asked of each block of each stage."""
        asked: dict[int, dict[int, Asked]] = {}
        if cells is None:
            return asked
        # A copy, because a traced pass reads no part of an input.
        for layer, of_layer in zip(layers, cells.clone().unbind(1), strict=True):
            stage, block, _ = self.deformable_layers[layer]
            within = None
            if seen is not None:
                stride, first = self.config.cell_geometry(stage)
                # A cell is in the image if its centre is.
                within = ((seen - first) / stride).ceil().clamp(min=1).long()
            asked.setdefault(stage, {})[block] = Asked(of_layer, within)
        return asked

    def _deformable_layers(self) -> Iterator[DeformableLayer]:
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            for position, block in enumerate(stage.blocks):
                assert isinstance(block, Block)
                if isinstance(block.attention, (DeformableAttention, DeformableDetrAttention)):
                    yield DeformableLayer(index, position, block.attention)

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the parameters for a forward pass in `dtype`, in place.

        Geometry and position tables keep their type: positions in half precision would be off
        by whole pixels. So does what follows the stages in a classifier.
        """
        for part in (self.stem, self.stages, self.downsamples):
            for name, parameter in part.named_parameters():
                if not name.endswith("relative_position_bias_table"):
                    parameter.data = parameter.data.to(dtype)
        return self


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class DAT(Trunk):
    """A DAT or DAT++ classifier."""

    def __init__(self, config: DatConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.stages[-1].dim)
        self.head = nn.Linear(config.stages[-1].dim, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of normalised images `(B, 3, H, W)`."""
        return self.forward_explained(images).logits

    def forward_explained(
        self, images: Tensor, layers: Sequence[int] = (), cells: Tensor | None = None
    ) -> Explained:
        """Logits and sampling locations of normalised images `(B, 3, H, W)`.

        For `layers` and `cells`, the attention that is asked for, see `stage_maps`.

        Raises:
            ValueError: the images are not of the size the model was built for, or not of the type
                or the device of its weights.
        """
        if not len(images):
            return of_no_images(self.forward_explained, images, layers, cells)
        maps, locations, attention = self.stage_maps(images, layers, cells)
        return Explained(self.head(self.pooled(maps[-1])), locations, attention)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over weights of the official names or of the network's own, as torch does.

        Raises:
            CheckpointError: keys are missing, unexpected or misshapen, or values are not finite
                numbers; the message names them. Without `strict`, own names may be a part.
        """
        if strict or is_official(state_dict):
            state_dict = checkpoint.translate(state_dict, self.config, self.state_dict())
        return super().load_state_dict(state_dict, strict, assign)

    def pooled(self, tokens: Tensor) -> Tensor:
        """What the head reads, `(B, C)`, from the last map `(B, H, W, C)`.

        It has the type of the head, not of the map: in bfloat16 a third of a thousand classes
        would have the logit of another one.
        """
        if usable(tokens):
            from model.kernels.pooling import normed_mean  # noqa: PLC0415

            return normed_mean(tokens, self.norm)
        return self.norm(tokens.to(self.norm.weight.dtype)).mean((1, 2))


class Stage(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, config: DatConfig, index: int) -> None:
        super().__init__()
        block = Block if config.family == "dat" else BlockPP
        self.blocks = nn.ModuleList(
            block(config, index, kind) for kind in config.stages[index].blocks
        )

    def forward(
        self, tokens: Tensor, asked: Mapping[int, Asked] = NOTHING
    ) -> tuple[Tensor, list[Tensor], list[AttentionWeights]]:
        """New tokens `(B, H, W, C)`, and what the deformable blocks say of themselves.

        Args:
            tokens: `(B, H, W, C)`.
            asked: by block, whose attention is asked for.

        Returns:
            The tokens, the sampling locations of each, and the attention that was asked for.
        """
        stream = Stream(tokens)
        locations: list[Tensor] = []
        attention: list[AttentionWeights] = []
        for index, block in enumerate(self.blocks):
            stream, moved, weights = block(stream, asked.get(index))
            if moved is not None:
                locations.append(moved)
            if weights is not None:
                attention.append(weights)
        return stream.sum(), locations, attention


class Block(nn.Module):
    """A pre-norm transformer block of DAT."""

    def __init__(self, config: DatConfig, stage: int, kind: str) -> None:
        super().__init__()
        dim = config.stages[stage].dim
        self.norm1 = nn.LayerNorm(dim)
        self.attention = make_attention(config, stage, kind)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, stream: Stream, asked: Asked | None = None) -> Attended:
        """The stream `(B, H, W, C)` after it, and what a deformable block says of itself."""
        tokens, normed = self.enter(stream)
        of_whom = () if asked is None else (asked,)  # the attention of other blocks takes none
        stream, locations, weights = self.attention(normed, tokens, *of_whom)
        tokens, normed = add_norm(self.norm2, stream)
        return Attended(self.mlp(normed, tokens), locations, weights)

    def enter(self, stream: Stream) -> Normed:
        """The tokens that the attention adds to, and those that it sees."""
        return add_norm(self.norm1, stream)


class BlockPP(Block):
    """A block of DAT++: a local perception unit before it, a convolution inside its MLP."""

    def __init__(self, config: DatConfig, stage: int, kind: str) -> None:
        super().__init__(config, stage, kind)
        dim = config.stages[stage].dim
        # The residual around the unit is folded into the centre tap of its kernel.
        self.lpu = DepthwiseConv(dim)
        self.mlp = ConvMlp(dim)

    def enter(self, stream: Stream) -> Normed:
        """The tokens that the attention adds to, and those that it sees."""
        return convolve_sum_norm(self.lpu, self.norm1, stream)


def make_attention(config: DatConfig, stage: int, kind: str) -> nn.Module:
    """The attention of a block, by its letter in `StageConfig.blocks`."""
    if kind == "D":
        deformable = DeformableAttention if config.family == "dat" else DeformableAttentionPP
        return deformable(config, stage)
    if kind == "Q":
        return DeformableDetrAttention(config, stage)
    if kind == "N":
        return NeighborhoodAttention(config, stage)
    return WindowAttention(config, stage, shifted=kind == "S")


class Mlp(nn.Module):
    """Linear, GELU, linear, and the residual around them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor, residual: Tensor) -> Stream:
        """Tokens `(B, H, W, C)` to the same shape, added to the residual."""
        return linear_add(self.fc2, linear(self.fc1, tokens, "gelu"), residual)


class ConvMlp(Mlp):
    """The MLP of DAT++: a depthwise convolution with a residual before the GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        # The residual is folded into the centre tap.
        self.dwconv = DepthwiseConv(4 * dim)

    def forward(self, tokens: Tensor, residual: Tensor) -> Stream:
        """Tokens `(B, H, W, C)` to the same shape, added to the residual."""
        hidden = convolve(self.dwconv, linear(self.fc1, tokens), "gelu")
        return linear_add(self.fc2, hidden, residual)


class ConvNorm(nn.Module):
    """A convolution, a LayerNorm over channels and an activation, on tokens."""

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        stride: int,
        padding: int,
        *,
        bias: bool,
        activation: Literal["none", "gelu"] = "none",
    ) -> None:
        super().__init__()
        self.activation: Literal["none", "gelu"] = activation
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(after)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, H, W, before)` to `(B, H', W', after)`."""
        return convolve_norm(self.conv, self.norm, tokens, self.activation)


def make_stem(config: DatConfig) -> nn.Sequential:
    """Tokens `(B, H, W, 3)` to the map of the first stage.

    DAT cuts patches of 4x4 pixels; DAT++ has two overlapping convolutions.
    """
    dim = config.stages[0].dim
    if config.family == "dat":
        return nn.Sequential(ConvNorm(3, dim, 4, 4, 0, bias=True))
    first = ConvNorm(3, dim // 2, 3, 2, 1, bias=True, activation="gelu")
    second = ConvNorm(dim // 2, dim, 3, 2, 1, bias=True)
    # Our own checkpoints count the GELU between them.
    return nn.Sequential(OrderedDict({"0": first, "2": second}))


def create_model(name: str, **changes: Any) -> DAT:
    """Build a published variant in evaluation mode, with parameters not yet loaded.

    Args:
        name: a key of `model.config.VARIANTS`.
        **changes: fields of `DatConfig` that differ, such as `num_classes`, or `image_size`, which
            also sets the window and the tables of a DAT (v1) as `DatConfig.resized` does.

    Raises:
        KeyError: no such variant; the message lists those there are.
        TypeError: no such field.
        ValueError: a size that the variant cannot take.
    """
    if name not in VARIANTS:
        raise KeyError(f"no variant {name!r}; there are {', '.join(VARIANTS)}")
    config = VARIANTS[name]
    if "image_size" in changes:
        config = config.resized(changes.pop("image_size"))
    return DAT(replace(config, **changes)).eval()


def load_model(
    weights: str | Path | Checkpoint,
    variant: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> DAT:
    """Build the model that a checkpoint is of, in evaluation mode, with its weights.

    Args:
        weights: a file, or what `model.checkpoint.read` made of it.
        variant: a key of `VARIANTS`; `None` finds it by the names and shapes of the weights.
        image_size: `(H, W)` of the input or the side of a square, pixels, if not that of the
            checkpoint; the position tables of a DAT (v1) are then interpolated as the official
            loader does.

    Raises:
        CheckpointError: the checkpoint cannot be used; the message names the file, the key and
            the expectation.
    """
    given = weights if isinstance(weights, Checkpoint) else checkpoint.read(weights)
    config = checkpoint.configure(given, variant, image_size)
    network = DAT(config).eval()
    state = given.state
    if image_size is not None:
        official = is_official(state)
        expected = official_shapes(config) if official else checkpoint.shapes(network.state_dict())
        state = checkpoint.resize_tables(state, expected)
    try:
        network.load_state_dict(state)
    except CheckpointError as fault:
        raise CheckpointError(f"{given.path}: {fault}") from fault
    return network
