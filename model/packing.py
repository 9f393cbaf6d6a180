"""Weights laid out as oneDNN multiplies them: once, where every call would do it again.

For inference on a CPU: the layouts are oneDNN's own, so a packed network can no longer be moved,
cast, trained, saved, loaded or exported.
"""

from math import prod

import torch
from torch import nn

from model.attention import DeformableAttention
from model.dat import Trunk
from model.fused import fuses, is_small

# Linear layers of fewer features are small whatever they multiply.
NARROW = 8


def pack(network: Trunk) -> None:
    """Pack the linear layers and convolutions of a network, in place.

    Nothing happens where oneDNN does not compute: on other devices and in float16.
    """
    with torch.no_grad():
        if not fuses(next(network.parameters())):
            return
        sizes = [network.config.map_size(index) for index in range(len(network.stages))]
        pack_layers(network.stem, network.config.image_size)
        for stage, size in zip(network.stages, sizes, strict=True):
            pack_layers(stage, size)
        for downsample, size in zip(network.downsamples, sizes[:-1], strict=True):
            pack_layers(downsample, size)


def _repeat_kernels(shared: nn.Conv2d, groups: int) -> None:
    """Give every group the depthwise kernels of its own that it shares with the others."""
    shared.weight = nn.Parameter(shared.weight.repeat(groups, 1, 1, 1))
    if shared.bias is not None:
        shared.bias = nn.Parameter(shared.bias.repeat(groups))
    shared.in_channels = shared.out_channels = shared.groups = len(shared.weight)


def pack_layers(module: nn.Module, size: tuple[int, int]) -> None:
    """Pack what works on maps of `(H, W)` cells; on maps of another size it is only slower."""
    for layer in module.modules():
        if isinstance(layer, DeformableAttention):
            _repeat_kernels(layer.offset_conv, layer.offset_groups)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if layer.out_features < NARROW or is_small(layer, prod(size)):
                continue
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        elif isinstance(layer, nn.Conv2d):
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                layer.weight,
                layer.padding,
                layer.stride,
                layer.dilation,
                layer.groups,
                (1, layer.in_channels, *size),
            )
        else:
            continue
        layer.weight = nn.Parameter(packed, requires_grad=False)
