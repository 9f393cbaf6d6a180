"""Linear layers and convolutions together with what follows them, on channels-last tokens.

On the CPU oneDNN adds the bias, applies the activation and adds the residual while a product is
in the cache; one by one each is a pass over memory. The results differ by the rounding of a
float32 sum. On CUDA a kernel does so where the activation is the larger part. Everywhere else,
where gradients are wanted, and in a model that is compiled or exported, these are the plain
operations.
"""

from collections.abc import Callable
from typing import Literal

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


def linear(layer: nn.Module, x: Tensor, activation: Activation = "none") -> Tensor:
    """`activation(layer(x))`, `(..., C)` to `(..., D)`."""
    if activation == "gelu" and usable(x, HALF):
        from model.kernels.linear import linear_gelu  # noqa: PLC0415

        assert isinstance(layer, nn.Linear)
        return linear_gelu(x, layer.weight, layer.bias)
    if not fuses(x):
        return _PLAIN[activation](layer(x))
    return _onednn._linear_pointwise(x, layer.weight, layer.bias, activation, [], "none")


def linear_add(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """`residual + layer(x)`, `(..., C)` and `(..., D)` to `(..., D)`."""
    if not fuses(x):
        return residual + layer(x)
    return _onednn._linear_pointwise.binary(x, residual, layer.weight, layer.bias, "add")


def convolve(conv: nn.Module, tokens: Tensor, activation: Activation = "none") -> Tensor:
    """`activation(conv(tokens))`, `(B, H, W, C)` to `(B, H', W', D)`."""
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
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
    )
