"""From bytes to the numbers that a classifier reads, on the device that holds them."""

import torch
from torch import Tensor, nn

from model.kernels import BYTES, usable
from model.transforms import MEAN, STD


def check_bytes(pixels: Tensor) -> None:
    """Check that these are the pixels of images, `(B, H, W, 3)`, uint8.

    Raises:
        ValueError: they are not.
    """
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != torch.uint8:
        raise ValueError(
            f"expected RGB images (B, H, W, 3), torch.uint8; got {tuple(pixels.shape)}, "
            f"{pixels.dtype}"
        )


class Normalise(nn.Module):
    """Bytes `(B, H, W, 3)` to the model's input `(B, 3, H, W)`, on the device that holds them.

    The arithmetic is float32 in the official order; only the result is cast to `dtype`. The
    result keeps the memory order of the bytes (`torch.channels_last`). Move this module with
    `.to(device)` only: `.to(dtype)` would round the mean and the deviation.

    Args:
        dtype: of the result.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise a batch of bytes.

        Raises:
            ValueError: it is none.
        """
        check_bytes(pixels)
        if usable(pixels, BYTES):
            from model.kernels.pixels import normalise  # noqa: PLC0415

            return normalise(pixels.contiguous(), self.mean, self.std, self.dtype)
        # Whole rows, of values of all channels in turn: torch computes a row of 3 values no faster
        # than one of 300.
        B, H, W, _ = pixels.shape
        mean, std = (of_channels.view(3).repeat(W) for of_channels in (self.mean, self.std))
        rows = (pixels.reshape(B, H, 3 * W).float() / 255 - mean) / std
        return rows.to(self.dtype).view(B, H, W, 3).permute(0, 3, 1, 2)
