"""The feature pyramid: every level sees what the coarser ones have found.

Lin et al., "Feature Pyramid Networks for Object Detection", arXiv:1612.03144. As in the
official configurations: no norm, no activation, nearest-neighbour upsampling.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.detection.config import DetectorConfig
from model.fused import convolve


class FeaturePyramid(nn.Module):
    """Five levels of equally many channels from the maps of the backbone."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.first_stage = config.first_stage
        channels = config.channels
        dims = [stage.dim for stage in config.backbone.stages[config.first_stage :]]
        self.laterals = nn.ModuleList(nn.Linear(dim, channels) for dim in dims)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in dims)
        before = [dims[-1], channels]
        self.extra = nn.ModuleList(
            nn.Conv2d(before[index], channels, 3, 2, 1)
            for index in range(config.extra_convolutions)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels `(B, H, W, channels)`, finest first, from the backbone's maps `(B, H, W, C)`."""
        used = maps[self.first_stage :]
        merged = [lateral(tokens) for lateral, tokens in zip(self.laterals, used, strict=True)]
        for finer in reversed(range(len(merged) - 1)):
            merged[finer] = merged[finer] + upsampled(merged[finer + 1], merged[finer])
        levels = [
            convolve(output, tokens) for output, tokens in zip(self.outputs, merged, strict=True)
        ]
        source = maps[-1]
        for convolution in self.extra:
            source = convolve(convolution, source)
            levels.append(source)
        if not self.extra:
            levels.append(levels[-1][:, ::2, ::2])
        return levels


def upsampled(tokens: Tensor, like: Tensor) -> Tensor:
    """A map `(B, h, w, C)` at the size of another `(B, H, W, C)`, by the nearest neighbour."""
    enlarged = F.interpolate(tokens.permute(0, 3, 1, 2), like.shape[1:3], mode="nearest")
    return enlarged.permute(0, 2, 3, 1)
