"""What a classifier costs: its parameters, and the FLOPs of one image.

FLOPs are counted as in the tables of the papers (fvcore's convention, batch 1): a multiply-add is
one, an element that is sampled bilinearly (a feature, or a place of a position table) is 4, an
element that is layer-normed is 5. Activations, softmax, pooling and additions count nothing.

The count is that of the model, not of our way to compute it: a query of a neighbourhood has
`window ** 2` keys, although `local_attention` computes more of them. It follows from the
configuration alone; the tests hold it against what the modules compute.
"""

from dataclasses import dataclass
from math import ceil, prod

from model.config import DatConfig
from model.dat import DAT
from model.official import official_shapes
from model.swin_config import SwinConfig

_SAMPLED, NORMED = 4, 5  # FLOPs of an element


@dataclass(frozen=True)
class Cost:
    """What a classifier costs.

    Attributes:
        parameters: as published, those of the official checkpoint; folding the weights drops a
            few biases from our own.
        flops: of one image.
    """

    parameters: int
    flops: int


def cost(network: DAT, image_size: tuple[int, int] | None = None) -> Cost:
    """Cost of a network, or of the same network for images of another size `(H, W)`.

    Raises:
        ValueError: a size that the network cannot take.
    """
    config = network.config if image_size is None else network.config.resized(image_size)
    return Cost(sum(map(prod, official_shapes(config).values())), flops(config))


def flops(config: DatConfig | SwinConfig) -> int:
    """FLOPs of one image, from stem to head."""
    if isinstance(config, SwinConfig):
        return _swin_flops(config)
    last = len(config.stages) - 1
    pooled = config.stages[last].dim
    head = NORMED * prod(config.map_size(last)) * pooled + pooled * config.num_classes
    return trunk_flops(config) + head


def trunk_flops(config: DatConfig) -> int:
    """FLOPs of the stem and the stages for one image."""
    total = _stem_flops(config)
    kernel = 2 if config.family == "dat" else 3
    for stage, spec in enumerate(config.stages):
        N, C = prod(config.map_size(stage)), spec.dim
        if stage > 0:
            before = config.stages[stage - 1].dim
            total += N * C * (kernel**2 * before + NORMED)
        mlp = 2 * 4 * N * C**2
        if config.family == "dat_pp":
            mlp += 9 * 4 * N * C  # its depthwise convolution
            mlp += 9 * N * C  # the local perception unit
        total += len(spec.blocks) * (mlp + 2 * NORMED * N * C)
        total += sum(attention_flops(config, stage, kind) for kind in spec.blocks)
    return total


def attention_flops(config: DatConfig, stage: int, kind: str) -> int:
    """FLOPs of one attention, projections included, by its letter in `StageConfig.blocks`."""
    spec, (H, W) = config.stages[stage], config.map_size(stage)
    N, C = H * W, spec.dim
    if kind == "D":
        Ns = ceil(H / spec.offset_stride) * ceil(W / spec.offset_stride)
        offsets = Ns * C * (spec.offset_kernel**2 + NORMED + 2)
        keys_values = Ns * C * (_SAMPLED + 2 * C)
        bias = _SAMPLED * spec.heads * N * Ns
        return 2 * N * C**2 + offsets + keys_values + bias + 2 * N * Ns * C
    if kind == "Q":
        projections = 2 * C + 3 * spec.heads * spec.points
        return N * C * (projections + (_SAMPLED + 1) * spec.points)
    window = config.window
    projected = N
    if kind == "N":
        projected = max(H, window) * max(W, window)  # small maps are padded before
    return (3 * projected + N) * C**2 + 2 * N * window**2 * C


def _stem_flops(config: DatConfig) -> int:
    N, C = prod(config.map_size(0)), config.stages[0].dim
    if config.family == "dat":
        return N * C * (4 * 4 * 3 + NORMED)
    halved = prod(ceil(side / 2) for side in config.image_size)
    return halved * (C // 2) * (9 * 3 + NORMED) + N * C * (9 * (C // 2) + NORMED)


def _swin_flops(config: SwinConfig) -> int:
    total = 0
    for stage, depth in enumerate(config.depths):
        N, C = prod(config.map_size(stage)), config.channels(stage)
        before = C // 2
        if stage == 0:
            total += N * C * (config.patch**2 * 3 + NORMED)
        else:
            total += N * 4 * before * (C + NORMED)
        padded = prod(config.windows(stage, 0).padded_size)
        attention = 4 * padded * C**2 + 2 * padded * config.window**2 * C
        mlp = 2 * N * C * int(config.mlp_ratio * C)
        total += depth * (attention + mlp + 2 * NORMED * N * C)
    last = len(config.depths) - 1
    pooled = config.channels(last)
    return total + NORMED * prod(config.map_size(last)) * pooled + pooled * config.num_classes
