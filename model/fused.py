"""Linear layers and convolutions together with what follows them, on channels-last tokens.

On the CPU oneDNN adds the bias, applies the activation and adds the residual while a product is
in the cache; one by one each is a pass over memory. The results differ by the rounding of a
float32 sum. On CUDA kernels of `model.kernels` do the same where it pays: a GELU is part of the
linear layer or the depthwise convolution before it, a residual is added where the sum is normed or
convolved. Everywhere else, where gradients are wanted, and on the CPU in a model that is compiled
or exported, these are the plain operations.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import HALF, usable

Activation = Literal["none", "relu", "gelu"]

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": nn.Identity(),
    "relu": F.relu,
    "gelu": F.gelu,
}
_onednn = torch.ops.mkldnn
# Channels. Of a wider product the library saves more than a pass for the GELU takes.
WIDEST = 512
# Multiply-adds of a float32 product for one image, up to which it is done before oneDNN has begun:
# that takes 10 us to look its own product up, which torch does not.
FEWEST = 1 << 21


class Stream(NamedTuple):
    """The residual stream between two layers, with what one of them may still have to add.

    Attributes:
        tokens: `(B, H, W, C)`.
        branch: likewise, to be added to the tokens; `None` where that is done.
    """

    tokens: Tensor
    branch: Tensor | None = None

    def sum(self) -> Tensor:
        """All of it, `(B, H, W, C)`."""
        return self.tokens if self.branch is None else self.tokens + self.branch


class Normed(NamedTuple):
    """Tokens `(B, H, W, C)` and their norm, of the same shape."""

    tokens: Tensor
    normed: Tensor


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of 3x3 cells, with a bias, that keeps the size of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, and lay out the kernels tap by tap on CUDA, where ours reads them so."""
        super()._apply(fn, recurse)
        if self.weight.is_cuda:
            self.weight.data = tap_by_tap(self.weight.data)
        return self


def linear(layer: nn.Module, x: Tensor, activation: Activation = "none") -> Tensor:
    """`activation(layer(x))`, `(..., C)` to `(..., D)`."""
    if activation == "gelu" and usable(x, HALF) and x.shape[-1] <= WIDEST:
        from model.kernels.linear import linear_gelu  # noqa: PLC0415

        assert isinstance(layer, nn.Linear)
        return linear_gelu(x, layer.weight, layer.bias)
    if not _by_onednn(layer, x):
        return _PLAIN[activation](layer(x))
    return _onednn._linear_pointwise(x, layer.weight, layer.bias, activation, [], "none")


def linear_add(layer: nn.Module, x: Tensor, residual: Tensor) -> Stream:
    """The residual `(..., D)` with `layer(x)` of `(..., C)` added, or to be added."""
    if usable(x):
        return Stream(residual, layer(x))
    if not _by_onednn(layer, x):
        return Stream(residual + layer(x))
    return Stream(_onednn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add"))


def add_norm(norm: nn.LayerNorm, stream: Stream) -> Normed:
    """The sum of a stream, and its norm."""
    if usable(stream.tokens):
        from model.kernels.norm import add_norm  # noqa: PLC0415

        return Normed(*add_norm(stream.tokens, stream.branch, norm))
    tokens = stream.sum()
    return Normed(tokens, norm(tokens))


def convolve(conv: nn.Module, tokens: Tensor, activation: Activation = "none") -> Tensor:
    """`activation(conv(tokens))`, `(B, H, W, C)` to `(B, H', W', D)`."""
    if isinstance(conv, DepthwiseConv) and activation == "gelu" and usable(tokens):
        from model.kernels.depthwise import convolve_gelu  # noqa: PLC0415

        return convolve_gelu(tokens, conv)
    maps = tokens.permute(0, 3, 1, 2)
    if not fuses(tokens):
        return _PLAIN[activation](conv(maps)).permute(0, 2, 3, 1)
    assert isinstance(conv, nn.Conv2d)
    convolved = _onednn._convolution_pointwise(
        maps,
        conv.weight,
        conv.bias,
        conv.padding,
        conv.stride,
        conv.dilation,
        conv.groups,
        activation,
        [],
        "none",
    )
    return convolved.permute(0, 2, 3, 1)


def convolve_add(
    conv: nn.Conv2d, weight: Tensor, tokens: Tensor, other: Tensor, activation: Activation = "none"
) -> Tensor:
    """`activation(conv(tokens) + other)` on the CPU in inference, where `fuses` holds.

    Args:
        conv: the convolution.
        weight: in place of its own, such as a part of it.
        tokens: `(B, H, W, C)`.
        other: of the shape of the result, `(B, H', W', D)`.
        activation: of the sum.
    """
    maps, addend = tokens.permute(0, 3, 1, 2), other.permute(0, 3, 1, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    shape = conv.padding, conv.stride, conv.dilation, conv.groups
    convolved = _onednn._convolution_pointwise.binary(
        maps, addend, weight, conv.bias, *shape, "add", 1.0, activation, [], None
    )
    return convolved.permute(0, 2, 3, 1)


def convolve_norm(
    conv: nn.Conv2d,
    norm: nn.LayerNorm,
    tokens: Tensor,
    activation: Literal["none", "gelu"] = "none",
) -> Tensor:
    """`activation(norm(conv(tokens)))`, `(B, H, W, C)` to `(B, H', W', D)`."""
    if not usable(tokens):
        return _PLAIN[activation](norm(convolve(conv, tokens)))
    from model.kernels.norm import norm_activate  # noqa: PLC0415

    # cuDNN would add the bias in a pass of its own.
    maps = F.conv2d(tokens.permute(0, 3, 1, 2), conv.weight, None, conv.stride, conv.padding)
    convolved = channels_last_tokens(maps)  # as cuDNN leaves them
    return norm_activate(convolved, conv.bias, norm, gelu=activation == "gelu")


def convolve_sum_norm(conv: DepthwiseConv, norm: nn.LayerNorm, stream: Stream) -> Normed:
    """The convolution of the sum of a stream, and its norm."""
    if usable(stream.tokens):
        from model.kernels.depthwise import convolve_sum_norm  # noqa: PLC0415

        return Normed(*convolve_sum_norm(stream.tokens, stream.branch, conv, norm))
    tokens = convolve(conv, stream.sum())
    return Normed(tokens, norm(tokens))


def tap_by_tap(weight: Tensor) -> Tensor:
    """Depthwise kernels `(C, 1, 3, 3)` with the taps of all channels beside each other in memory.

    What lies so stays where it is: a captured graph may read it.
    """
    if weight.stride(0) == 1:
        return weight
    return (
        weight.permute(1, 2, 3, 0).clone(memory_format=torch.contiguous_format).permute(3, 0, 1, 2)
    )


def channels_last_tokens(maps: Tensor) -> Tensor:
    """`(B, C, H, W)` to contiguous `(B, H, W, C)`."""
    return maps.permute(0, 2, 3, 1).contiguous()


def keep_kernels_channels_last(module: nn.Module) -> None:
    """Lay out the kernels of all convolutions as the maps are, or each call would rearrange them.

    Loading weights keeps the layout.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)


def fuses(x: Tensor) -> bool:
    """Whether oneDNN computes what follows from this tensor."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bfloat16()))
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
    )


@cache
def has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this CPU, with instructions for it or without."""
    return torch.backends.mkldnn.is_available() and bool(_onednn._is_mkldnn_bf16_supported())


def is_small(layer: nn.Linear, cells: int) -> bool:
    """Whether a linear layer over so many cells of an image is too small for oneDNN."""
    work = cells * layer.in_features * layer.out_features
    return layer.weight.dtype == torch.float32 and work <= FEWEST


def _by_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN multiplies the tokens `(B, ..., C)`: always by weights that are packed."""
    if not fuses(x):
        return False
    assert isinstance(layer, nn.Linear)
    return layer.weight.is_mkldnn or not is_small(layer, prod(x.shape[1:-1]))
