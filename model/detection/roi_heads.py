"""Heads over regions of interest: boxes and masks of the two-stage detectors.

Mask R-CNN: He et al., arXiv:1703.06870; Cascade R-CNN: Cai and Vasconcelos, arXiv:1906.09756;
both as in mmdetection 2.26. Regions are `(R, 4)` in pixels of the padded images.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.detection.boxes import decode, xy_pairs
from model.detection.config import DetectorConfig
from model.detection.dense import Candidates
from model.detection.detections import Found, select_entries
from model.detection.roi_align import pooled_features
from model.detection.rpn import Proposals, RegionProposals, proposals
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
        """What was found in every image.

        Args:
            levels: of the pyramid, `(B, H, W, channels)`, strides 4 to 64.
            candidates: what `forward` returned.
            limits: `(B, 2)`, `(x, y)`: width and height of the images without padding.
            scales_xy: `(B, 2)`, by which the original images were enlarged.
        """
        found = self.boxes(levels, proposals(candidates), limits, scales_xy)
        return self.with_masks(levels, found, scales_xy)

    def boxes(
        self, levels: Sequence[Tensor], proposed: Proposals, limits: Tensor, scales_xy: Tensor
    ) -> Found:
        """What was found, without masks, from the proposals of every image."""
        batch = B, R = proposed.boxes.shape[:2]
        regions, logits, deltas = self.refine(
            levels, proposed.boxes.flatten(0, 1), _image_index(B, R, limits.device), limits
        )
        return select_entries(
            regions.unflatten(0, batch),
            proposed.counts,
            logits.softmax(-1).unflatten(0, batch),
            deltas.unflatten(0, batch),
            limits=limits,
            scales_xy=scales_xy,
        )

    def refine(
        self, levels: Sequence[Tensor], regions: Tensor, image_index: Tensor, limits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send regions through the box heads.

        Between two heads every region moves to where its best foreground class wants it.

        Returns:
            Regions `(R, 4)` that entered the last head, the mean of all heads' logits
            `(R, K + 1)`, and the last head's deltas `(R, K, 4)`, scaled.
        """
        all_logits = []
        last = len(self.box_heads) - 1
        region_limits = limits[image_index]
        for index, (head, stds) in enumerate(zip(self.box_heads, STDS, strict=False)):
            logits, deltas = head(pooled_features(levels, regions, image_index, BOX_BINS))
            logits, deltas = logits.to(limits.dtype), deltas.to(limits.dtype)
            deltas = deltas * deltas.new_tensor(stds)
            all_logits.append(logits)
            if index < last:
                label = logits[:, :-1].argmax(-1)
                row = torch.arange(len(label), device=label.device)
                regions = decode(regions, deltas[row, label], region_limits)
        return regions, torch.stack(all_logits).mean(0), deltas

    def with_masks(self, levels: Sequence[Tensor], found: Found, scales_xy: Tensor) -> Found:
        """The same with masks: the mean of all heads' probabilities."""
        batch = B, R = found.labels.shape
        regions = (found.boxes * xy_pairs(scales_xy).unsqueeze(1)).flatten(0, 1)
        image_index = _image_index(B, R, regions.device)
        features = pooled_features(levels, regions, image_index, MASK_BINS)
        masks = [head(features, found.labels.flatten()) for head in self.mask_heads]
        mean = torch.stack(masks).mean(0).to(scales_xy.dtype)
        return found._replace(mask_probabilities=mean.unflatten(0, batch))


def _image_index(images: int, rows: int, device: torch.device) -> Tensor:
    """The image of each of the rows of all images."""
    return torch.arange(images, device=device).unsqueeze(1).expand(-1, rows).flatten()
