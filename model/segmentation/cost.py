"""FLOPs of a segmenter, counted as those of the classifiers (`model.cost`).

They are those of the published model, whatever our way to compute it leaves out
(`model.segmentation.fusion`): the resizing of maps counts nothing, as additions do not.
"""

from math import prod

from model.cost import NORMED, trunk_flops
from model.segmentation.config import SegmenterConfig
from model.segmentation.semantic_fpn import DEPTHS
from model.segmentation.upernet import POOLED_SIDES

_TAPS = 3 * 3


def flops(config: SegmenterConfig, input_size: tuple[int, int]) -> int:
    """FLOPs of one forward pass.

    Args:
        config: of the segmenter.
        input_size: `(H, W)`, pixels.

    Raises:
        ValueError: the backbone cannot take the size.
    """
    backbone = config.backbone.resized(input_size)
    cells = [prod(backbone.map_size(stage)) for stage in range(len(config.dims))]
    norms = sum(NORMED * N * dim for N, dim in zip(cells, config.dims, strict=True))
    return trunk_flops(backbone) + norms + head_flops(config, input_size)


def head_flops(config: SegmenterConfig, input_size: tuple[int, int]) -> int:
    """FLOPs of all that follows the backbone, up to logits at a quarter of the input's size."""
    sizes = [config.backbone.map_size(stage, input_size) for stage in range(len(config.dims))]
    head = _semantic_fpn_flops if config.kind == "semantic_fpn" else _upernet_flops
    return head(config, sizes) + prod(sizes[0]) * config.channels * config.num_classes


def _semantic_fpn_flops(config: SegmenterConfig, sizes: list[tuple[int, int]]) -> int:
    total = 0
    levels, C = config.pyramid_channels, config.channels
    for size, dim, depth in zip(sizes, config.dims, DEPTHS, strict=True):
        N = prod(size)
        total += N * levels * (dim + _TAPS * levels)
        total += N * _TAPS * levels * C
        # The map has doubled before each further convolution.
        total += sum(4**doubled * N * _TAPS * C**2 for doubled in range(1, depth))
    return total


def _upernet_flops(config: SegmenterConfig, sizes: list[tuple[int, int]]) -> int:
    (*finer, last), C = config.dims, config.channels
    total = sum(side**2 * last * C for side in POOLED_SIDES)
    total += prod(sizes[-1]) * _TAPS * (last + len(POOLED_SIDES) * C) * C
    for size, dim in zip(sizes[:-1], finer, strict=True):
        total += prod(size) * C * (dim + _TAPS * C)
    return total + prod(sizes[0]) * _TAPS * len(sizes) * C**2
