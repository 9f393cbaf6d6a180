"""What the two dense heads share: the best entries of every level, as boxes.

The number of candidates depends on the size of the image alone, so that a forward pass up to
here depends on no data.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.detection.anchors import Anchors
from model.detection.boxes import decode

MOST_OF_A_LEVEL = 1000


class LevelOutput(NamedTuple):
    """What a dense head says of one level.

    Attributes:
        logits: `(B, H, W, A * K)`, classes of each of the `A` anchors of a cell.
        deltas: `(B, H, W, A * 4)`.
    """

    logits: Tensor
    deltas: Tensor


class Candidates(NamedTuple):
    """The best `(anchor, class)` entries of all levels.

    Attributes:
        boxes: `(B, M, 4)`, pixels of the padded image, inside the image, level by level.
        scores: `(B, M)`.
        labels: `(B, M)`.
        of_levels: how many of the `M` are of each level, finest first.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    of_levels: tuple[int, ...]


def candidates(outputs: Sequence[LevelOutput], anchors: Anchors, limits: Tensor) -> Candidates:
    """The 1000 best entries of each level; one anchor may be among them with several classes.

    Args:
        outputs: of the levels, finest first.
        anchors: of the same levels.
        limits: `(B, 2)`, `(x, y)`: width and height of the images without padding.
    """
    boxes, scores, labels = [], [], []
    for level, (logits, deltas) in enumerate(outputs):
        B, H, W, _ = logits.shape
        best, anchor, label = _best_entries(logits.reshape(B, H * W * anchors.per_cell, -1))
        chosen = deltas.reshape(B, -1, 4).gather(1, anchor.unsqueeze(-1).expand(-1, -1, 4))
        # Half precision would move a box of a large image by pixels.
        chosen = chosen.to(limits.dtype)
        boxes.append(decode(anchors.at(level, W, anchor), chosen, limits.unsqueeze(1)))
        scores.append(best.to(limits.dtype).sigmoid())
        labels.append(label)
    of_levels = tuple(label.shape[1] for label in labels)
    return Candidates(torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(labels, 1), of_levels)


def _best_entries(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of the logits `(B, N, K)`, each `(B, n)`: value, anchor, class; best first."""
    classes = logits.shape[2]
    # An entry among the best belongs to an anchor whose best entry is among the best anchors.
    anchors = logits.amax(-1).topk(min(MOST_OF_A_LEVEL, logits.shape[1])).indices
    entries = logits.gather(1, anchors.unsqueeze(-1).expand(-1, -1, classes)).flatten(1)
    values, index = entries.topk(min(MOST_OF_A_LEVEL, entries.shape[1]))
    return values, anchors.gather(1, index // classes), index % classes
