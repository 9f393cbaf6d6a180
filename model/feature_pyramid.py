"""The feature pyramid: every level sees what the coarser ones have found.

Lin et al., "Feature Pyramid Networks for Object Detection", arXiv:1612.03144. As in the
official configurations: no norm, no activation, nearest-neighbour upsampling.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.fused import convolve


class FeaturePyramid(nn.Module):
    """Levels of equally many channels from maps of the backbone, one from each.

    Args:
        dims: channels of the maps, finest first.
        channels: of every level.
    """

    def __init__(self, dims: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Linear(dim, channels) for dim in dims)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels `(B, H, W, channels)` from maps `(B, H, W, C)`, both finest first."""
        merged = [lateral(tokens) for lateral, tokens in zip(self.laterals, maps, strict=True)]
        for finer in reversed(range(len(merged) - 1)):
            merged[finer] = merged[finer] + upsampled(merged[finer + 1], merged[finer])
        return [
            convolve(output, tokens) for output, tokens in zip(self.outputs, merged, strict=True)
        ]


def upsampled(tokens: Tensor, like: Tensor) -> Tensor:
    """A map `(B, h, w, C)` at the size of another `(B, H, W, C)`, by the nearest neighbour."""
    enlarged = F.interpolate(tokens.permute(0, 3, 1, 2), like.shape[1:3], mode="nearest")
    return enlarged.permute(0, 2, 3, 1)
