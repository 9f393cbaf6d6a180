"""Convolutions one after the other, as every head of a detector begins."""

from torch import Tensor, nn

from model.fused import convolve


class Tower(nn.ModuleList):
    """3x3 convolutions, each followed by a ReLU."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `(B, H, W, C)` to the same shape."""
        for convolution in self:
            tokens = convolve(convolution, tokens, "relu")
        return tokens
