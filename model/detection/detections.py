"""What a detector finds in an image, and which of the boxes it proposes count as found."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from model.detection.boxes import decode, xy_pairs
from model.detection.config import MOST_DETECTIONS, SCORE_THRESHOLD
from model.detection.nms import first_of, moved_apart, nms, until

IOU_THRESHOLD = 0.5
# Of one region: 21 probabilities above the threshold would add up to more than 1, and so would 20
# but for rounding.
_MOST_CLASSES = 20


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


class Found(NamedTuple):
    """What was found in the images of a batch, best first, on their device.

    `R` is 100; on the CPU it is the largest of the counts.

    Attributes:
        boxes: `(B, R, 4)`, `(x1, y1, x2, y2)` in pixels of the original images; zeros past the
            count.
        scores: `(B, R)`; zeros past the count.
        labels: `(B, R)`, int64, class indices from 0; zeros past the count.
        counts: `(B,)`, int64: how many of each `R` are real.
        mask_probabilities: `(B, R, 28, 28)` over each box, zeros past the count, or `None` from a
            detector without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor
    mask_probabilities: Tensor | None = None

    def of_images(self) -> list[Detections]:
        """Copies on the host, each cut to what is real."""
        parts = [
            part.to("cpu", copy=True)
            for part in (self.boxes, self.scores, self.labels, self.mask_probabilities)
            if part is not None
        ]
        return [
            Detections(*(part[image, :count] for part in parts))
            for image, count in enumerate(self.counts.tolist())
        ]


def select(boxes: Tensor, scores: Tensor, labels: Tensor) -> Found:
    """The detections of every image: class-wise NMS over the boxes with a sufficient score.

    Args:
        boxes: `(B, M, 4)`, pixels of the original images.
        scores: `(B, M)`.
        labels: `(B, M)`.
    """
    sufficient = scores > SCORE_THRESHOLD
    moved = moved_apart(boxes, labels, sufficient)
    kept = nms(moved, scores, sufficient, IOU_THRESHOLD, MOST_DETECTIONS)
    return Found(kept.of(boxes), kept.of(scores), kept.of(labels), kept.counts)


def select_entries(
    regions: Tensor,
    counts: Tensor,
    scores: Tensor,
    deltas: Tensor,
    *,
    limits: Tensor,
    scales_xy: Tensor,
) -> Found:
    """The detections of every image; one region may count as several classes.

    Args:
        regions: `(B, R, 4)`, pixels of the padded images.
        counts: `(B,)`, how many regions are real.
        scores: `(B, R, K + 1)`, probabilities, the background last.
        deltas: `(B, R, K, 4)`.
        limits: `(B, 2)`, `(x, y)`: width and height of the images without padding.
        scales_xy: `(B, 2)`, by which the original images were enlarged.
    """
    _, R, K, _ = deltas.shape
    real = until(counts, R).unsqueeze(-1)
    foreground = scores[..., :-1]
    sufficient = (foreground > SCORE_THRESHOLD) & real
    # Only what can be found is decoded.
    entries = first_of(sufficient.flatten(1), R * min(K, _MOST_CLASSES))
    of_region = replace(entries, indices=entries.indices // K)
    chosen = entries.of(deltas.flatten(1, 2))
    boxes = decode(of_region.of(regions), chosen, limits.unsqueeze(1))
    boxes = boxes / xy_pairs(scales_xy).unsqueeze(1)
    return select(boxes, entries.of(foreground.flatten(1)), entries.indices % K)
