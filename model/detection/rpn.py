"""The region proposal network: where the heads of a two-stage detector look.

Ren et al., "Faster R-CNN", arXiv:1506.01497; post-processing as in mmdetection 2.26.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.detection.anchors import RPN_ANCHORS
from model.detection.config import DetectorConfig
from model.detection.dense import Candidates, LevelOutput, candidates
from model.detection.nms import best_of, moved_apart, nms
from model.fused import convolve

IOU_THRESHOLD = 0.7
MOST_PROPOSALS = 1000


class Proposals(NamedTuple):
    """Where the heads of a two-stage detector look, best first.

    `R` is at most 1000; on the CPU it is the largest of the counts.

    Attributes:
        boxes: `(B, R, 4)`, pixels of the padded images; zeros past the count.
        counts: `(B,)`, int64: how many of each `R` are real.
    """

    boxes: Tensor
    counts: Tensor


class RegionProposals(nn.Module):
    """Objectness and boxes at every cell of every level."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        anchors, channels = RPN_ANCHORS.per_cell, config.channels
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Linear(channels, anchors)
        self.boxes = nn.Linear(channels, anchors * 4)

    def forward(self, levels: Sequence[Tensor], limits: Tensor) -> Candidates:
        """The best entries of every level; see `dense.candidates`.

        Args:
            levels: of the pyramid, `(B, H, W, channels)`, strides 4 to 64.
            limits: `(B, 2)`, `(x, y)`: width and height of the images without padding.
        """
        return candidates(self.outputs(levels), RPN_ANCHORS, limits)

    def outputs(self, levels: Sequence[Tensor]) -> list[LevelOutput]:
        """What the network says of every level."""
        hidden = [convolve(self.conv, tokens, "relu") for tokens in levels]
        return [LevelOutput(self.objectness(tokens), self.boxes(tokens)) for tokens in hidden]


def proposals(found: Candidates) -> Proposals:
    """What of the candidates the heads look at."""
    boxes, scores = (_by_level(part, found.of_levels) for part in (found.boxes, found.scores))
    B, levels, N, _ = boxes.shape
    # An anchor that lies over padding alone was clipped to nothing, and so was what fills a level.
    real = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    groups = torch.arange(levels, device=boxes.device).unsqueeze(1).expand(-1, N).flatten()
    moved = moved_apart(boxes.flatten(1, 2), groups, real.flatten(1))
    # Levels do not touch each other, so they are searched side by side.
    kept = nms(
        moved.view(B * levels, N, 4),
        scores.flatten(0, 1),
        real.flatten(0, 1),
        IOU_THRESHOLD,
        MOST_PROPOSALS,
    )
    boxes, scores, real = (
        part.view(B, -1, *part.shape[2:])
        for part in (kept.of(boxes.flatten(0, 1)), kept.of(scores.flatten(0, 1)), kept.real)
    )
    best = best_of(scores, real, MOST_PROPOSALS)
    return Proposals(best.of(boxes), best.counts)


def _by_level(values: Tensor, of_levels: Sequence[int]) -> Tensor:
    """`(B, levels, N, ...)` from `(B, M, ...)`, with zeros up to the length `N` of the longest."""
    padded = values.new_zeros(len(values), len(of_levels), max(of_levels), *values.shape[2:])
    for level, of_level in enumerate(values.split(list(of_levels), 1)):
        padded[:, level, : of_level.shape[1]] = of_level
    return padded
