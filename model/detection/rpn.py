"""The region proposal network: where the heads of a two-stage detector look.

Ren et al., "Faster R-CNN", arXiv:1506.01497; post-processing as in mmdetection 2.26.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.detection.anchors import RPN_ANCHORS
from model.detection.config import DetectorConfig
from model.detection.dense import Candidates, LevelOutput, candidates
from model.detection.nms import nms
from model.fused import convolve

IOU_THRESHOLD = 0.7
MOST_PROPOSALS = 1000


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


def proposals(found: Candidates) -> list[Tensor]:
    """Proposals `(n, 4)` of every image, at most 1000, best first, in its resized pixels."""
    levels = found.levels.cpu()
    return [
        _proposals(boxes, scores, levels).to(found.boxes.device)
        for boxes, scores in zip(found.boxes.cpu(), found.scores.cpu(), strict=True)
    ]


def _proposals(boxes: Tensor, scores: Tensor, levels: Tensor) -> Tensor:
    """What remains of the candidates of one image."""
    # An anchor that lies over padding alone was clipped to nothing.
    width_and_height = boxes[:, 2:] - boxes[:, :2]
    real = (width_and_height > 0).all(-1)
    boxes, scores, levels = boxes[real], scores[real], levels[real]
    kept = nms(boxes.numpy(), scores.numpy(), levels.numpy(), IOU_THRESHOLD, MOST_PROPOSALS)
    return boxes[torch.from_numpy(kept)]
