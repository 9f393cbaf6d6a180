"""DAT++ as the backbone of a detector or a segmenter, for images of any size."""

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from model import openmmlab
from model.attention import DeformableAttentionPP
from model.attention_weights import AttentionWeights
from model.config import DatConfig
from model.dat import Block, DeformableLayer, Stage, Trunk
from model.local_attention import NeighborhoodAttention
from model.official import Rule

# Input sizes whose geometry stays in memory: up to 50 MB each in the tiny detectors, 81 in base.
SIZES_KEPT = 8


class Features(NamedTuple):
    """What the backbone returns.

    Attributes:
        maps: the four maps `(B, H, W, C)`, strides 4, 8, 16 and 32.
        sampling_locations: for each of `Trunk.deformable_layers`, `(B, G, Hk, Wk, 2)`, (y, x),
            in the coordinates of `model.attention`.
        attention: for each layer that was asked about.
    """

    maps: tuple[Tensor, ...]
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...]


class Backbone(Trunk):
    """Stem and stages of DAT++, with a LayerNorm on the output of each stage in use.

    The norms are on the way out only: the next stage gets the map without it.
    """

    def __init__(self, config: DatConfig, first_stage: int) -> None:
        super().__init__(config)
        self.norms = nn.ModuleList(
            nn.LayerNorm(stage.dim) if index >= first_stage else nn.Identity()
            for index, stage in enumerate(config.stages)
        )

    def forward(
        self,
        images: Tensor,
        layers: Sequence[int] = (),
        cells: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Features:
        """Maps of normalised images `(B, 3, H, W)` of the size that the backbone is for.

        For the other arguments see `Trunk.stage_maps`. Padding counts as image here, as in the
        official code: the same image with more of it gives other maps.

        Raises:
            ValueError: the images are of another size.
        """
        maps, locations, attention = self.stage_maps(images, layers, cells, seen)
        normed = (norm(tokens) for norm, tokens in zip(self.norms, maps, strict=True))
        return Features(tuple(normed), locations, attention)

    def cast(self, dtype: torch.dtype) -> Self:
        """As `Trunk.cast`, with the norms."""
        self.norms.to(dtype)
        return super().cast(dtype)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def for_size(self, image_size: tuple[int, int]) -> Self:
        """The same backbone for images of `(H, W)` pixels, with the very same parameters.

        Only geometry, and what is laid out by it, is made anew.

        Raises:
            ValueError: the backbone cannot take the size.
        """
        config = self.config.resized(image_size)
        shared = {id(parameter): parameter for parameter in self.parameters()}
        view = copy.deepcopy(self, dict(shared))
        view.config = config
        for index, stage in enumerate(view.stages):
            assert isinstance(stage, Stage)
            for block in stage.blocks:
                assert isinstance(block, Block)
                assert isinstance(block.attention, (DeformableAttentionPP, NeighborhoodAttention))
                block.attention.fit(config.map_size(index))
        return view.to(next(iter(shared.values())).device).train(self.training)


class DenseNetwork(nn.Module, ABC):
    """A network that predicts something everywhere in an image, whatever the size of the image.

    Subclasses add what follows the backbone.

    Attributes:
        backbone: its parameters are those of all sizes.
        name: of the network.
    """

    def __init__(self, backbone: Backbone, name: str) -> None:
        super().__init__()
        self.backbone, self.name = backbone, name
        self._sizes: OrderedDict[tuple[int, int], Backbone] = OrderedDict()
        self.register_load_state_dict_post_hook(_forget_sizes)

    @abstractmethod
    def rules(self) -> Iterator[Rule]:
        """How its weights come from those of an official checkpoint."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take over weights, as `DAT.load_state_dict` does.

        Raises:
            CheckpointError: as there.
        """
        given = openmmlab.parameters(state_dict)
        if strict or openmmlab.is_official(given):
            rules = list(self.rules())
            given = openmmlab.translated(given, self.state_dict(), rules, self.name)
        return super().load_state_dict(given, strict, assign)

    @property
    def deformable_layers(self) -> list[DeformableLayer]:
        """The deformable attentions, in the order of the forward pass."""
        return self.backbone.deformable_layers

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast the parameters for a forward pass in `dtype`, in place.

        Geometry stays in float32 or wider, and so does what is computed with it.
        """
        self.backbone.cast(dtype)
        for part in self.children():
            if part is not self.backbone:
                part.to(dtype)
        self._sizes.clear()
        return self

    def backbone_of(self, images: Tensor) -> Backbone:
        """The backbone for images `(B, 3, H, W)`.

        Raises:
            ValueError: it cannot take them.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name} reads images (B, 3, H, W); got {tuple(images.shape)}")
        return self.backbone_for((images.shape[2], images.shape[3]))

    def backbone_for(self, image_size: tuple[int, int]) -> Backbone:
        """The backbone for images of `(H, W)` pixels.

        The sizes used last stay in memory. All of them have the same parameters.

        Raises:
            ValueError: the backbone cannot take the size.
        """
        if image_size not in self._sizes:
            self._sizes[image_size] = self.backbone.for_size(image_size)
            if len(self._sizes) > SIZES_KEPT:
                self._sizes.popitem(last=False)
        self._sizes.move_to_end(image_size)
        return self._sizes[image_size]

    def train(self, mode: bool = True) -> Self:
        """Set the mode."""
        self._sizes.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Parameters are shared with the backbones of all sizes, buffers are not.
        self._sizes.clear()
        return super()._apply(fn, recurse)


def _forget_sizes(module: nn.Module, _: object) -> None:
    assert isinstance(module, DenseNetwork)
    module._sizes.clear()
