"""The head of RetinaNet: classes and boxes at every cell of every level.

Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002; post-processing as in
mmdetection 2.26.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from model.detection.anchors import RETINANET_ANCHORS
from model.detection.boxes import xy_pairs
from model.detection.config import DetectorConfig
from model.detection.dense import Candidates, LevelOutput, candidates
from model.detection.detections import Found, select
from model.detection.tower import Tower
from model.fused import convolve

_DEPTH = 4


class RetinaNetHead(nn.Module):
    """One classifier and one box regressor, shared by all levels."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.class_tower = Tower(config.channels, _DEPTH)
        self.box_tower = Tower(config.channels, _DEPTH)
        anchors = RETINANET_ANCHORS.per_cell
        self.classes = nn.Conv2d(config.channels, anchors * config.num_classes, 3, padding=1)
        self.boxes = nn.Conv2d(config.channels, anchors * 4, 3, padding=1)

    def forward(self, levels: Sequence[Tensor], limits: Tensor) -> Candidates:
        """The best entries of every level; see `dense.candidates`.

        Args:
            levels: of the pyramid, `(B, H, W, channels)`, strides 8 to 128.
            limits: `(B, 2)`, `(x, y)`: width and height of the images without padding.
        """
        return candidates(self.outputs(levels), RETINANET_ANCHORS, limits)

    def outputs(self, levels: Sequence[Tensor]) -> list[LevelOutput]:
        """What the network says of every level."""
        return [
            LevelOutput(
                convolve(self.classes, self.class_tower(tokens)),
                convolve(self.boxes, self.box_tower(tokens)),
            )
            for tokens in levels
        ]

    def find(
        self, _levels: Sequence[Tensor], candidates: Candidates, _limits: Tensor, scales_xy: Tensor
    ) -> Found:
        """What was found in every image, from the candidates alone.

        Args:
            candidates: what `forward` returned.
            scales_xy: `(B, 2)`, by which the original images were enlarged.
        """
        boxes = candidates.boxes / xy_pairs(scales_xy).unsqueeze(1)
        return select(boxes, candidates.scores, candidates.labels)
