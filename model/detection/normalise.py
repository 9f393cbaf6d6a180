"""From bytes to the numbers that a detector reads, on the device that holds them."""

import torch
from torch import Tensor, nn

from model.kernels import BYTES, usable
from model.normalise import check_bytes

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Normalise(nn.Module):
    """Bytes to a detector's input, on the device that holds them.

    Move this module with `.to(device)` only: `.to(dtype)` would round the mean and the deviation.

    Args:
        dtype: of the result.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        inverse = 1 / torch.tensor(STD, dtype=torch.float64)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", inverse.float().view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, resized_sizes: Tensor) -> Tensor:
        """Normalise a batch of bytes, and fill the padding with the mean colour, zero.

        Args:
            pixels: `(B, H, W, 3)`, RGB.
            resized_sizes: `(B, 2)`, `(H, W)` of the images without padding, pixels.

        Returns:
            `(B, 3, H, W)`, in the memory order of the bytes (`torch.channels_last`).

        Raises:
            ValueError: the pixels are no such batch.
        """
        check_bytes(pixels)
        if usable(pixels, BYTES):
            from model.kernels.pixels import normalise_padded  # noqa: PLC0415

            return normalise_padded(
                pixels.contiguous(), resized_sizes, self.mean, self.inverse_std, self.dtype
            )
        _, H, W, _ = pixels.shape
        height, width = resized_sizes.view(-1, 2, 1, 1, 1).unbind(1)
        row = torch.arange(H, device=pixels.device).view(H, 1)
        column = torch.arange(W, device=pixels.device)
        inside = (row < height) & (column < width)  # (B, 1, H, W)
        images = (pixels.permute(0, 3, 1, 2).float() - self.mean) * self.inverse_std
        return torch.where(inside, images, 0).to(self.dtype)
