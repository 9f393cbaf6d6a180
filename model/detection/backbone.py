"""DAT++ as the backbone of a detector, for images of any size."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from model.attention import DeformableAttentionPP
from model.attention_weights import AttentionWeights
from model.config import DatConfig
from model.dat import Block, Stage, Trunk
from model.local_attention import NeighborhoodAttention


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
