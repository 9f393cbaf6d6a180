"""The work of the device for a classifier, from bytes to ranked classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention_weights import AttentionWeights
from model.dat import DAT
from model.kernels import usable
from model.normalise import Normalise
from model.swin import Swin


class Ranked(NamedTuple):
    """What the device says of a batch.

    Attributes:
        scores: softmax probabilities `(B, num_classes)`, float32, best first.
        classes: `(B, num_classes)`, int32, the class of each score; of equal scores the lower
            one first.
        logits: `(B, num_classes)`, float32, of each class in turn.
        sampling_locations: for each deformable layer `(B, G, Hk, Wk, 2)`, (y, x); of a Swin none.
        attention: for each layer that was asked about.
    """

    scores: Tensor
    classes: Tensor
    logits: Tensor
    sampling_locations: tuple[Tensor, ...]
    attention: tuple[AttentionWeights, ...] = ()


class Classify(nn.Module):
    """A classifier with what comes before and after it on the device.

    Args:
        model: is cast to `dtype` in place.
        dtype: of the features.
    """

    def __init__(self, model: DAT | Swin, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalise = Normalise(dtype)
        self.model: DAT | Swin = model.cast(dtype)

    def forward(
        self, pixels: Tensor, cells: Tensor | None = None, *, layers: Sequence[int] = ()
    ) -> Ranked:
        """Rank the classes of RGB bytes `(B, H, W, 3)`.

        For `layers` and `cells`, the attention that is asked for, see `forward_explained` of the
        model.
        """
        logits, locations, attention = self.model.forward_explained(
            self.normalise(pixels), layers, cells
        )
        return Ranked(*_rank(logits), logits.float(), locations, attention)


def _rank(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and classes of `Ranked`."""
    if usable(logits):
        from model.kernels.ranking import MOST_CLASSES, rank  # noqa: PLC0415

        if logits.shape[1] <= MOST_CLASSES:
            return rank(logits)
    probabilities = logits.softmax(-1, dtype=torch.float32)
    scores, classes = probabilities.sort(dim=-1, descending=True, stable=True)
    return scores, classes.int()
