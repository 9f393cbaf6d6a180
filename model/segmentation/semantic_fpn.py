"""The head of SemanticFPN: a feature pyramid, every level of which grows to the finest one.

Kirillov et al., "Panoptic Feature Pyramid Networks", arXiv:1901.02446, section 3.1. The official
normalisation, a BatchNorm after every convolution, is folded into it.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from model.feature_pyramid import FeaturePyramid
from model.fused import convolve
from model.segmentation.config import SegmenterConfig
from model.segmentation.resize import resized

# Of the four levels, finest first.
DEPTHS = (1, 1, 2, 3)


class Branch(nn.ModuleList):
    """3x3 convolutions with a ReLU; a level that is to grow is doubled after each."""

    def __init__(self, before: int, after: int, depth: int, *, grows: bool) -> None:
        super().__init__(
            nn.Conv2d(after if index else before, after, 3, padding=1) for index in range(depth)
        )
        self.grows = grows

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, h, w, before)` to `(B, H, W, after)`."""
        for convolution in self:
            tokens = convolve(convolution, tokens, "relu")
            if self.grows:
                height, width = tokens.shape[1:3]
                tokens = resized(tokens, (2 * height, 2 * width))
        return tokens


class SemanticFpnHead(nn.Module):
    """Logits at a quarter of the input's size from the maps of the backbone."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(config.dims, config.pyramid_channels)
        self.branches = nn.ModuleList(
            Branch(config.pyramid_channels, config.channels, depth, grows=level > 0)
            for level, depth in enumerate(DEPTHS)
        )
        self.classes = nn.Linear(config.channels, config.num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `(B, H, W, num_classes)` from maps `(B, H, W, C)`, finest first."""
        levels = self.pyramid(maps)
        finest, *others = (
            branch(level) for branch, level in zip(self.branches, levels, strict=True)
        )
        merged = finest
        for tokens in others:
            # A level that was doubled may be larger than the finest, whose size was rounded up.
            merged = merged + resized(tokens, finest.shape[1:3])
        return self.classes(merged)
