"""The head of UPerNet: pooling of the last map, a pyramid, and a convolution over all levels.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv:1807.10221; the pooling is
that of PSPNet (Zhao et al., arXiv:1612.01105). The official normalisation, a BatchNorm after every
convolution but the classifier, is folded into it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fused import convolve, linear
from model.segmentation.config import SegmenterConfig
from model.segmentation.fusion import fused_levels
from model.segmentation.resize import resized

POOLED_SIDES = (1, 2, 3, 6)  # cells


class UperNetHead(nn.Module):
    """Logits at a quarter of the input's size from the maps of the backbone."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        *finer, last = config.dims
        channels = config.channels
        self.pooling = PyramidPooling(last, channels)
        self.laterals = nn.ModuleList(nn.Linear(dim, channels) for dim in finer)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in finer)
        self.fusion = nn.Conv2d(len(config.dims) * channels, channels, 3, padding=1)
        self.classes = nn.Linear(channels, config.num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `(B, H, W, num_classes)` from maps `(B, H, W, C)`, finest first."""
        *finer, last = maps
        merged = [
            linear(lateral, tokens, "relu")
            for lateral, tokens in zip(self.laterals, finer, strict=True)
        ]
        merged.append(self.pooling(last))
        for level in reversed(range(len(finer))):
            coarser = resized(merged[level + 1], merged[level].shape[1:3])
            merged[level] = merged[level] + coarser
        levels = [
            convolve(output, tokens, "relu")
            for output, tokens in zip(self.outputs, merged[:-1], strict=True)
        ]
        return self.classes(fused_levels(self.fusion, (*levels, merged[-1])))


class PyramidPooling(nn.Module):
    """The last map beside its means over few large bins, which see all of the image."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(dim, channels) for _ in POOLED_SIDES)
        together = dim + len(POOLED_SIDES) * channels
        self.bottleneck = nn.Conv2d(together, channels, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, H, W, dim)` to `(B, H, W, channels)`."""
        together = torch.cat([tokens, *self.pooled(tokens)], -1)
        return convolve(self.bottleneck, together, "relu")

    def pooled(self, tokens: Tensor) -> list[Tensor]:
        """The means `(B, H, W, channels)`, at the size of the map, fewest bins first."""
        return [
            resized(linear(branch, mean_pooled(tokens, side), "relu"), tokens.shape[1:3])
            for branch, side in zip(self.branches, POOLED_SIDES, strict=True)
        ]


def mean_pooled(tokens: Tensor, side: int) -> Tensor:
    """Means `(B, side, side, C)` of a map `(B, H, W, C)` over as many bins.

    Bin `i` of an axis of `n` cells begins at `floor(i * n / side)` and ends before
    `ceil((i + 1) * n / side)`, so bins overlap where the side does not divide `n`.
    """
    means = F.adaptive_avg_pool2d(tokens.permute(0, 3, 1, 2), side)
    return means.permute(0, 2, 3, 1).contiguous()
