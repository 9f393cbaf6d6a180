"""Bytes of images to the normalised input of a network, in one pass.

The references are `model.transforms.Normalise` and `model.detection.transforms.Normalise`, with
the same result to the last bit: every step is rounded to float32 as there. Bytes and result have
the same memory order, so that a block of one is a block of the other. (On CUDA torch itself
multiplies by the reciprocal of a number where it is asked to divide by it.)
"""

import triton
import triton.language as tl
from torch import Tensor, dtype

BLOCK = 2048  # bytes; a thread reads 16 at once
WARPS = 4


def normalise(pixels: Tensor, mean: Tensor, std: Tensor, to: dtype) -> Tensor:
    """Normalise bytes as classifiers do, `(pixels / 255 - mean) / std`.

    Args:
        pixels: `(B, H, W, 3)`, uint8.
        mean: of each channel, float32.
        std: likewise.
        to: the type of the result.

    Returns:
        `(B, 3, H, W)`, `torch.channels_last`.
    """
    normalised = pixels.new_empty(pixels.shape, dtype=to)
    _normalise[_grid(pixels)](
        pixels, mean, std, normalised, pixels.numel() // len(pixels), block=BLOCK, num_warps=WARPS
    )
    return normalised.permute(0, 3, 1, 2)


def normalise_padded(
    pixels: Tensor, resized_sizes: Tensor, mean: Tensor, inverse_std: Tensor, to: dtype
) -> Tensor:
    """Normalise bytes as detectors do, `(pixels - mean) * inverse_std`, and zero in the padding.

    Args:
        pixels: `(B, H, W, 3)`, uint8.
        resized_sizes: `(B, 2)`, `(H, W)` of the images without padding, pixels.
        mean: of each channel, float32.
        inverse_std: likewise.
        to: the type of the result.

    Returns:
        `(B, 3, H, W)`, `torch.channels_last`.
    """
    assert resized_sizes.is_contiguous(), "this is a bug"
    normalised = pixels.new_empty(pixels.shape, dtype=to)
    _normalise_padded[_grid(pixels)](
        pixels,
        resized_sizes,
        mean,
        inverse_std,
        normalised,
        pixels.numel() // len(pixels),
        pixels.shape[2],
        block=BLOCK,
        num_warps=WARPS,
    )
    return normalised.permute(0, 3, 1, 2)


def _grid(pixels: Tensor) -> tuple[int, int]:
    assert pixels.is_contiguous(), "this is a bug"
    return triton.cdiv(pixels.numel() // len(pixels), BLOCK), len(pixels)


# Whether the bytes of an image are a multiple of 16 is compiled in: only then are 16 read at once.
@triton.jit
def _normalise(pixels, mean, std, normalised, image_bytes, block: tl.constexpr):
    """One program: a block of bytes of one image."""
    start = tl.program_id(1).to(tl.int64) * image_bytes
    byte = tl.program_id(0) * block + tl.arange(0, block)
    in_image = byte < image_bytes
    value = tl.load(pixels + start + byte, mask=in_image, other=0).to(tl.float32)
    # The plain division is not rounded correctly.
    value = tl.math.div_rn(value, 255.0) - _of_channel(mean, byte % 3)
    value = tl.math.div_rn(value, _of_channel(std, byte % 3))
    tl.store(normalised + start + byte, value.to(normalised.dtype.element_ty), mask=in_image)


@triton.jit(do_not_specialize=["W"])
def _normalise_padded(
    pixels, resized_sizes, mean, inverse_std, normalised, image_bytes, W, block: tl.constexpr
):
    """One program: a block of bytes of one image."""
    image = tl.program_id(1)
    start = image.to(tl.int64) * image_bytes
    byte = tl.program_id(0) * block + tl.arange(0, block)
    in_image = byte < image_bytes
    value = tl.load(pixels + start + byte, mask=in_image, other=0).to(tl.float32)
    value = (value - _of_channel(mean, byte % 3)) * _of_channel(inverse_std, byte % 3)
    height = tl.load(resized_sizes + 2 * image)
    width = tl.load(resized_sizes + 2 * image + 1)
    pixel = byte // 3
    value = tl.where((pixel // W < height) & (pixel % W < width), value, 0.0)
    tl.store(normalised + start + byte, value.to(normalised.dtype.element_ty), mask=in_image)


@triton.jit
def _of_channel(values, channel):
    """One of three values for each channel: three loads for a program, none for a byte."""
    first, second, third = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))
