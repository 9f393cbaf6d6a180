"""The feature pyramid of a detector, which has levels coarser than the maps of the backbone."""

from collections.abc import Sequence

from torch import Tensor, nn

from model.detection.config import DetectorConfig
from model.feature_pyramid import FeaturePyramid
from model.fused import convolve


class DetectorPyramid(FeaturePyramid):
    """Five levels of equally many channels from the maps of the backbone."""

    def __init__(self, config: DetectorConfig) -> None:
        channels = config.channels
        dims = [stage.dim for stage in config.backbone.stages[config.first_stage :]]
        super().__init__(dims, channels)
        self.first_stage = config.first_stage
        before = [dims[-1], channels]
        self.extra = nn.ModuleList(
            nn.Conv2d(before[index], channels, 3, 2, 1)
            for index in range(config.extra_convolutions)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels `(B, H, W, channels)`, finest first, from the backbone's maps `(B, H, W, C)`."""
        levels = super().forward(maps[self.first_stage :])
        source = maps[-1]
        for convolution in self.extra:
            source = convolve(convolution, source)
            levels.append(source)
        if not self.extra:
            levels.append(levels[-1][:, ::2, ::2])
        return levels
