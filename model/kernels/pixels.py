"""Bytes of images to the normalised input of a network, in one pass.

The references are `model.normalise.Normalise` and `model.detection.normalise.Normalise`, with
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
    channel = byte % 3
    first, second, third = _three(std)
    divisor = _of_channel(channel, first, second, third)
    # Three divisions for a program, none for a byte. The plain one is not rounded correctly.
    first, second, third = (
        tl.math.div_rn(1.0, first),
        tl.math.div_rn(1.0, second),
        tl.math.div_rn(1.0, third),
    )
    reciprocal = _of_channel(channel, first, second, third)
    value = _divide(value, 255.0, 1 / 255) - _of_channel(channel, *_three(mean))
    value = _divide(value, divisor, reciprocal)
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
    channel = byte % 3
    value = (value - _of_channel(channel, *_three(mean))) * _of_channel(
        channel, *_three(inverse_std)
    )
    height = tl.load(resized_sizes + 2 * image)
    width = tl.load(resized_sizes + 2 * image + 1)
    pixel = byte // 3
    value = tl.where((pixel // W < height) & (pixel % W < width), value, 0.0)
    tl.store(normalised + start + byte, value.to(normalised.dtype.element_ty), mask=in_image)


@triton.jit
def _three(values):
    return tl.load(values), tl.load(values + 1), tl.load(values + 2)


@triton.jit
def _of_channel(channel, first, second, third):
    """One of three values for each channel: they are loaded once for a program, not for a byte."""
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


@triton.jit
def _divide(value, divisor, reciprocal):
    """A quotient rounded correctly.

    What the first one leaves over is exact, and is divided too (Markstein, *IA-64 and Elementary
    Functions*, 2000, chapter 8).
    """
    quotient = value * reciprocal
    return tl.fma(tl.fma(quotient, -divisor, value), reciprocal, quotient)
