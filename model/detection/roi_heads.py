"""Heads over regions of interest: boxes and masks of the two-stage detectors.

Mask R-CNN: He et al., arXiv:1703.06870; Cascade R-CNN: Cai and Vasconcelos, arXiv:1906.09756;
both as in mmdetection 2.26. Regions are in pixels of the padded images.

All shapes depend on those of the input alone, except on the CPU, where rows are cut to the largest
number that an image of the batch has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.detection.boxes import decode, xy_pairs
from model.detection.config import DetectorConfig
from model.detection.dense import Candidates
from model.detection.detections import Found, select_entries
from model.detection.nms import until
from model.detection.roi_align import pooled_features
from model.detection.rpn import RegionProposals, proposals
from model.detection.tower import Tower
from model.fused import linear

BOX_BINS, MASK_BINS = 7, 14
_DEPTH = 4
# Of the deltas, head by head of a cascade.
STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))


class BoxHead(nn.Module):
    """Classes and boxes of regions.

    Two linear layers in Mask R-CNN; four convolutions and a linear layer in a cascade, with the
    BatchNorm of each convolution folded into it. The background is the last class.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        cascade = config.kind == "cascade_mask_rcnn"
        self.tower = Tower(config.channels, _DEPTH if cascade else 0)
        widths = [BOX_BINS**2 * config.channels, config.hidden, config.hidden][
            : 2 if cascade else 3
        ]
        self.hidden = nn.ModuleList(nn.Linear(before, config.hidden) for before in widths[:-1])
        self.classes = nn.Linear(config.hidden, config.num_classes + 1)
        self.boxes = nn.Linear(config.hidden, config.num_classes * 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(R, K + 1)` and deltas `(R, K, 4)` from features `(R, 7, 7, channels)`."""
        hidden = self.tower(features).flatten(1)
        for layer in self.hidden:
            hidden = linear(layer, hidden, "relu")
        return self.classes(hidden), self.boxes(hidden).unflatten(-1, (-1, 4))


class MaskHead(nn.Module):
    """Masks of regions, for the class that was found there."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.tower = Tower(config.channels, _DEPTH)
        # A transposed convolution with kernel and stride 2: each cell becomes 2x2 on its own.
        self.upsample = nn.Linear(config.channels, 4 * config.channels)
        self.classes = nn.Linear(config.channels, config.num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Probabilities `(R, 28, 28)` from features `(R, 14, 14, channels)` and labels `(R,)`."""
        return self.logits(features, labels).sigmoid()

    def logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Logits of the probabilities of `forward`."""
        R, H, W, C = features.shape
        hidden = self.tower(features)
        fine = linear(self.upsample, hidden, "relu").view(R, H * W * 4, C)
        logits = torch.baddbmm(
            self.classes.bias[labels].view(R, 1, 1), fine, self.classes.weight[labels].unsqueeze(-1)
        )
        blocks = logits.view(R, H, W, 2, 2).transpose(2, 3)
        return blocks.reshape(R, 2 * H, 2 * W)


class TwoStageHead(nn.Module):
    """Proposals, then boxes refined by one or several heads, then masks of what was found."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.rpn = RegionProposals(config)
        self.box_heads = nn.ModuleList(BoxHead(config) for _ in range(config.refinements))
        self.mask_heads = nn.ModuleList(MaskHead(config) for _ in range(config.refinements))

    def forward(self, levels: Sequence[Tensor], limits: Tensor) -> Candidates:
        """The candidates for proposals; see `RegionProposals.forward`."""
        return self.rpn(levels, limits)

    def find(
        self, levels: Sequence[Tensor], candidates: Candidates, limits: Tensor, scales_xy: Tensor
    ) -> Found:
        """What is in every image.

        Args:
            levels: of the pyramid, `(B, H, W, channels)`, strides 4 to 64.
            candidates: what `forward` returned.
            limits: `(B, 2)`, `(x, y)`: width and height of the images without padding.
            scales_xy: `(B, 2)`, by which the original images were enlarged.
        """
        proposed = proposals(candidates)
        regions, logits, deltas = self.refine(levels, proposed.boxes, limits)
        scores = logits.softmax(-1)
        found = select_entries(
            regions, proposed.counts, scores, deltas, limits=limits, scales_xy=scales_xy
        )
        return self.with_masks(levels, found, scales_xy)

    def refine(
        self, levels: Sequence[Tensor], regions: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send regions `(B, R, 4)` through the box heads.

        Between two heads every region moves to where its best foreground class wants it.

        Returns:
            Regions `(B, R, 4)` that entered the last head, the mean of all heads' logits
            `(B, R, K + 1)`, and the last head's deltas `(B, R, K, 4)`, scaled.
        """
        all_logits = []
        last = len(self.box_heads) - 1
        rows = regions.shape[:2]
        for index, (head, stds) in enumerate(zip(self.box_heads, STDS, strict=False)):
            features = pooled_features(levels, regions, BOX_BINS).flatten(0, 1)
            logits, deltas = (
                output.to(limits.dtype).unflatten(0, rows) for output in head(features)
            )
            deltas = _scaled(deltas, stds)
            all_logits.append(logits)
            if index < last:
                label = logits[..., :-1].argmax(-1)[..., None, None]
                of_label = deltas.gather(2, label.expand(-1, -1, 1, 4)).squeeze(2)
                regions = decode(regions, of_label, limits.unsqueeze(1))
        return regions, torch.stack(all_logits).mean(0), deltas

    def with_masks(self, levels: Sequence[Tensor], found: Found, scales_xy: Tensor) -> Found:
        """The same with masks: the mean of all heads' probabilities."""
        rows = B, R = found.labels.shape
        regions = found.boxes * xy_pairs(scales_xy).unsqueeze(1)
        features = pooled_features(levels, regions, MASK_BINS).flatten(0, 1)
        masks = [head(features, found.labels.flatten()) for head in self.mask_heads]
        mean = torch.stack(masks).mean(0).to(scales_xy.dtype).unflatten(0, rows)
        surplus = ~until(found.counts, R).view(B, R, 1, 1)
        return found._replace(mask_probabilities=mean.masked_fill(surplus, 0))


def _scaled(deltas: Tensor, stds: Sequence[float]) -> Tensor:
    """Deltas `(..., 4)` times their factors, of which no tensor is made: a capture forbids it."""
    scaled = [part * std for part, std in zip(deltas.unbind(-1), stds, strict=True)]
    return torch.stack(scaled, -1)
