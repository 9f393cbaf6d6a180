"""What a detector finds in an image, and which of the boxes it proposes count as found."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.detection.nms import nms

SCORE_THRESHOLD = 0.05  # a score must be above it
IOU_THRESHOLD = 0.5
MOST_DETECTIONS = 100


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: `(N, 4)`, `(x1, y1, x2, y2)` in pixels of the original image.
        scores: `(N,)`.
        labels: `(N,)`, class indices from 0.
        mask_probabilities: `(N, 28, 28)` over each box, or `None` from a detector without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probabilities: Tensor | None = None


def select(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """The detections of one image: class-wise NMS over the boxes with a sufficient score.

    Args:
        boxes: `(M, 4)`, pixels of the original image.
        scores: `(M,)`.
        labels: `(M,)`.
    """
    sufficient = scores > SCORE_THRESHOLD
    boxes, scores, labels = boxes[sufficient], scores[sufficient], labels[sufficient]
    kept = nms(boxes.numpy(), scores.numpy(), labels.numpy(), IOU_THRESHOLD, MOST_DETECTIONS)
    best = torch.from_numpy(kept)
    return Detections(boxes[best], scores[best], labels[best])
