"""As `model.kernels.pixels.normalise`, with divisions by one reciprocal and what it leaves."""

import triton
import triton.language as tl
from torch import Tensor, dtype


def normalise(
    pixels: Tensor, mean: Tensor, std: Tensor, to: dtype, *, block: int = 2048, warps: int = 4
) -> Tensor:
    normalised = pixels.new_empty(pixels.shape, dtype=to)
    image = pixels.numel() // len(pixels)
    _normalise_residual[triton.cdiv(image, block), len(pixels)](
        pixels, mean, std, normalised, image, block=block, num_warps=warps
    )
    return normalised.permute(0, 3, 1, 2)


@triton.jit
def _normalise_residual(pixels, mean, std, normalised, image_bytes, block: tl.constexpr):
    """One program: a block of bytes of one image."""
    start = tl.program_id(1).to(tl.int64) * image_bytes
    byte = tl.program_id(0) * block + tl.arange(0, block)
    in_image = byte < image_bytes
    value = tl.load(pixels + start + byte, mask=in_image, other=0).to(tl.float32)
    channel = byte % 3
    first, second, third = tl.load(std), tl.load(std + 1), tl.load(std + 2)
    divisor = tl.where(channel == 0, first, tl.where(channel == 1, second, third))
    first, second, third = (
        tl.math.div_rn(1.0, first), tl.math.div_rn(1.0, second), tl.math.div_rn(1.0, third)
    )  # fmt: skip
    reciprocal = tl.where(channel == 0, first, tl.where(channel == 1, second, third))
    first, second, third = tl.load(mean), tl.load(mean + 1), tl.load(mean + 2)
    middle = tl.where(channel == 0, first, tl.where(channel == 1, second, third))
    value = _divided(value, 255.0, 0.003921568859368563) - middle
    value = _divided(value, divisor, reciprocal)
    tl.store(normalised + start + byte, value.to(normalised.dtype.element_ty), mask=in_image)


@triton.jit
def _divided(value, divisor, reciprocal):
    """A quotient rounded correctly: the first one's error is computed exactly, and divided too."""
    quotient = value * reciprocal
    return tl.fma(tl.fma(-quotient, divisor, value), reciprocal, quotient)
