"""A convolution over maps of several sizes as if all were resized to the finest one before.

Resizing and convolving are linear and the first knows no channels, so they change places: each tap
of the kernel is a product at the map's own size, and what the taps give is resized and shifted. A
map of half the size has a quarter of the cells to multiply. In UPerNet that is half of all
arithmetic. The results differ by the rounding of a float32 sum.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fused import convolve, convolve_add, fuses
from model.segmentation.resize import resized

TAPS = 3  # of the kernel along each axis


def fused_levels(conv: nn.Conv2d, levels: Sequence[Tensor]) -> Tensor:
    """`relu(conv(levels resized to the finest and put together))`.

    Args:
        conv: of 3x3 cells, padded by one, from the channels of all levels together.
        levels: two or more, `(B, h, w, C)`, finest first.

    Returns:
        `(B, H, W, D)` of the size of the finest.
    """
    finest, *coarser = levels
    # In half precision sums of the taps would be rounded on their way. Kernels of a GPU are quick
    # at convolutions and slow at all that lies between products.
    if not fuses(finest) or finest.dtype != torch.float32:
        together = [resized(tokens, finest.shape[1:3]) for tokens in levels]
        return convolve(conv, torch.cat(together, -1), "relu")
    of_finest, *of_coarser = conv.weight.split([tokens.shape[-1] for tokens in levels], 1)
    return convolve_add(conv, of_finest, finest, _of_coarser(coarser, of_coarser, finest), "relu")


def _of_coarser(levels: Sequence[Tensor], kernels: Sequence[Tensor], finest: Tensor) -> Tensor:
    """What the coarser levels give together, `(B, H, W, D)`."""
    height, width = finest.shape[1:3]
    rows: list[Tensor] = []
    down: list[Tensor] = []
    for tokens, kernel in zip(levels, kernels, strict=True):
        h, w = tokens.shape[1:3]
        across = _resizing_of_taps(w, width).permute(1, 2, 0).flatten(1)  # (W, 3 w)
        for tap in range(TAPS):
            # (3 D, C), the taps of a row, leftmost first
            row = kernel[:, :, tap].permute(2, 0, 1).flatten(0, 1)
            of_cells = F.linear(tokens, row).unflatten(-1, (TAPS, -1)).flatten(2, 3)
            rows.append(torch.matmul(across, of_cells).flatten(2))  # (B, h, W D)
        down.extend(_resizing_of_taps(h, height))  # (H, h) of each tap
    together = torch.matmul(torch.cat(down, 1), torch.cat(rows, 1))
    return together.unflatten(-1, (width, -1))


def _resizing_of_taps(cells: int, size: int) -> Tensor:
    """For each tap the matrix `(size, cells)` that resizes an axis and shifts it, `(3, ...)`.

    Beyond the edges there is the padding of the convolution, nothing.
    """
    identity = torch.eye(cells, dtype=torch.float32).unsqueeze(0)
    matrix = F.interpolate(identity, size, mode="linear", align_corners=False)[0].T
    return F.pad(matrix, (0, 0, 1, 1)).unfold(0, size, 1).permute(0, 2, 1)
