"""Resizing of maps inside the heads of segmenters."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def resized(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """A map `(B, h, w, C)` at the size `(H, W)`, bilinearly.

    Pixels are areas (`align_corners=False`), the scale is that of the actual sizes, and nothing is
    antialiased.
    """
    maps = F.interpolate(tokens.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1)
