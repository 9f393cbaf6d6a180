"""What the images of a batch ask about attention, and which of the answers is whose."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.attention_weights import AttentionWeights
from model.geometry import MOST_QUERIES
from service.engine.items import AskingItem, LayerAttention

Layers = tuple[int, ...]  # deformable layers whose attention any image of a batch wants, ascending


def cells_of(item: AskingItem, layers: Layers) -> NDArray[np.int64]:
    """`(len(layers), MOST_QUERIES)` cells; the first one in layers of which an image wants none."""
    cells = np.zeros((len(layers), MOST_QUERIES), np.int64)
    for layer, of_layer in zip(item.wanted.attention, item.cells, strict=True):
        cells[layers.index(layer)] = of_layer
    return cells


def attention_of(
    item: AskingItem, layers: Layers, attention: Sequence[AttentionWeights], row: int
) -> tuple[LayerAttention, ...]:
    """The attention that an image wants, from that of its batch.

    Args:
        item: the image.
        layers: of the batch.
        attention: of each of them, on the host.
        row: of the image.
    """
    wanted = (attention[layers.index(layer)] for layer in item.wanted.attention)
    return tuple(LayerAttention(*(part[row].numpy() for part in weights)) for weights in wanted)


def flat(attention: Sequence[AttentionWeights]) -> list[Tensor]:
    """The tensors of all layers, one after the other."""
    return list(chain.from_iterable(attention))


def by_layer(tensors: Sequence[Tensor]) -> tuple[AttentionWeights, ...]:
    """What `flat` was given."""
    each = len(AttentionWeights._fields)
    starts = range(0, len(tensors), each)
    return tuple(AttentionWeights(*tensors[start : start + each]) for start in starts)
