"""What the demo detector minimises: the losses of Mask R-CNN, and one that draws points to objects.

Mask R-CNN: He et al., arXiv:1703.06870, with the assignment of mmdetection 2.26 and fewer samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from demo.detection.scenes import Scene
from demo.detection.targets import assign, encode, mask_targets, overlaps, sample
from model.detection import Detector
from model.detection.anchors import RPN_ANCHORS
from model.detection.dense import Candidates, LevelOutput, candidates
from model.detection.nms import moved_apart, nms
from model.detection.normalise import Normalise
from model.detection.roi_align import ragged_features
from model.detection.roi_heads import BOX_BINS, MASK_BINS, STDS, BoxHead, MaskHead, TwoStageHead

ANCHORS_SAMPLED = 128
REGIONS_SAMPLED = 64
MASKS_SAMPLED = 8
PROPOSALS = (400, 100)  # before and after NMS
# The part of an object's box, around its centre, where points are left alone.
GUIDANCE_SHARE = 0.7


@dataclass(frozen=True)
class Objects:
    """What is to be found in one image.

    Attributes:
        boxes: `(N, 4)`, pixels of the padded input.
        labels: `(N,)`.
        instances: `(H, W)`, see `demo.detection.scenes.Scene`.
    """

    boxes: Tensor
    labels: Tensor
    instances: Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one padded size.

    Attributes:
        pixels: uint8 `(B, H, W, 3)`.
        sizes: `(B, 2)`, `(H, W)` without padding.
        objects: of every image.
    """

    pixels: Tensor
    sizes: Tensor
    objects: list[Objects]

    @classmethod
    def of(cls, views: Sequence[Scene], padded: tuple[int, int]) -> "Batch":
        """Pad views at the detector's input to `(H, W)`."""
        pixels = np.zeros((len(views), *padded, 3), np.uint8)
        for target, seen in zip(pixels, views, strict=True):
            height, width = seen.instances.shape
            target[:height, :width] = seen.pixels
        objects = [
            Objects(
                torch.from_numpy(seen.boxes),
                torch.from_numpy(seen.labels),
                torch.from_numpy(np.ascontiguousarray(seen.instances)),
            )
            for seen in views
        ]
        sizes = torch.tensor([seen.instances.shape for seen in views])
        return cls(torch.from_numpy(pixels), sizes, objects)


@dataclass(frozen=True)
class Losses:
    """The terms of the loss, each a mean over samples or points."""

    objectness: Tensor
    proposals: Tensor
    classes: Tensor
    boxes: Tensor
    masks: Tensor
    guidance: Tensor


def losses(detector: Detector, batch: Batch, generator: torch.Generator) -> Losses:
    """Losses of a batch."""
    head = detector.head
    assert isinstance(head, TwoStageHead)
    height, width = batch.pixels.shape[1:3]
    features = detector.backbone_for((height, width))(Normalise()(batch.pixels, batch.sizes))
    levels = detector.fpn(features.maps)
    outputs = head.rpn.outputs(levels)
    limits = batch.sizes.flip(-1).float()
    objectness, proposals = _of_anchors(outputs, batch.objects, generator)
    with torch.no_grad():
        regions = _proposals(candidates(outputs, RPN_ANCHORS, limits))
    classes, boxes, masks = _of_regions(head, levels, regions, batch.objects, generator)
    guidance = _guidance(detector, features.sampling_locations[-1], batch)
    return Losses(objectness, proposals, classes, boxes, masks, guidance)


def _of_anchors(
    outputs: Sequence[LevelOutput], objects: Sequence[Objects], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the objectness, and distance of the deltas."""
    B = len(objects)
    logits = torch.cat([output.logits.reshape(B, -1) for output in outputs], 1)
    deltas = torch.cat([output.deltas.reshape(B, -1, 4) for output in outputs], 1)
    anchors = torch.cat(
        [
            RPN_ANCHORS.at(level, output.logits.shape[2], torch.arange(output.logits[0].numel()))
            for level, output in enumerate(outputs)
        ]
    )
    said, wanted, distance = [], [], logits.new_zeros(())
    for of_image, image_logits, image_deltas in zip(objects, logits, deltas, strict=True):
        assigned = assign(overlaps(anchors, of_image.boxes), 0.3, 0.7, best_of_each=True)
        positive, negative = sample(assigned, ANCHORS_SAMPLED, 0.5, generator)
        said.append(image_logits[torch.cat((positive, negative))])
        wanted.append((torch.arange(len(said[-1])) < len(positive)).float())
        target = encode(anchors[positive], of_image.boxes[assigned[positive]])
        distance = distance + (image_deltas[positive] - target).abs().sum()
    count = sum(map(len, said))
    return F.binary_cross_entropy_with_logits(torch.cat(said), torch.cat(wanted)), distance / count


def _proposals(found: Candidates) -> list[Tensor]:
    """The best candidates `(n, 4)` of every image."""
    before, after = PROPOSALS
    scores, best = found.scores.topk(min(before, found.scores.shape[1]))
    boxes = found.boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
    levels = torch.arange(len(found.of_levels)).repeat_interleave(torch.tensor(found.of_levels))
    real = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    kept = nms(moved_apart(boxes, levels[best], real), scores, real, 0.7, after)
    of_images = zip(kept.of(boxes), kept.counts.tolist(), strict=True)
    return [proposed[:count] for proposed, count in of_images]


def _of_regions(
    head: TwoStageHead,
    levels: Sequence[Tensor],
    proposals: Sequence[Tensor],
    objects: Sequence[Objects],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the classes, distance of the deltas, cross-entropy of the masks."""
    (box_head,), (mask_head,) = head.box_heads, head.mask_heads
    assert isinstance(box_head, BoxHead)
    assert isinstance(mask_head, MaskHead)
    background = mask_head.classes.out_features
    regions, image_index, labels, wanted, drawn, masks = [], [], [], [], [], []
    total = 0
    for image, (proposed, of_image) in enumerate(zip(proposals, objects, strict=True)):
        # The objects themselves are regions too: the first proposals miss them.
        boxes = torch.cat((of_image.boxes, proposed))
        assigned = assign(overlaps(boxes, of_image.boxes), 0.5, 0.5, best_of_each=False)
        positive, negative = sample(assigned, REGIONS_SAMPLED, 0.25, generator)
        owner = assigned[positive]
        regions += [boxes[positive], boxes[negative]]
        labels += [of_image.labels[owner], torch.full_like(negative, background)]
        image_index.append(torch.full((len(positive) + len(negative),), image))
        wanted.append(encode(boxes[positive], of_image.boxes[owner], STDS[0]))
        chosen = positive[:MASKS_SAMPLED]
        drawn.append(total + torch.arange(len(chosen)))
        masks.append(
            mask_targets(of_image.instances, owner[:MASKS_SAMPLED], boxes[chosen], 2 * MASK_BINS)
        )
        total += len(image_index[-1])
    region, index, label = torch.cat(regions), torch.cat(image_index), torch.cat(labels)
    logits, deltas = box_head(ragged_features(levels, region, index, BOX_BINS))
    positive = (label < background).nonzero().squeeze(1)
    moved = deltas[positive, label[positive]]
    distance = (moved - torch.cat(wanted)).abs().sum() / total

    row = torch.cat(drawn)
    features = ragged_features(levels, region[row], index[row], MASK_BINS)
    seen = mask_head.logits(features, label[row])
    return (
        F.cross_entropy(logits, label),
        distance,
        F.binary_cross_entropy_with_logits(seen, torch.cat(masks)),
    )


def _guidance(detector: Detector, sampling_locations: Tensor, batch: Batch) -> Tensor:
    """Mean distance by which sampling points of the last layer miss every object.

    From a point to the nearest of the objects' boxes, each shrunk to `GUIDANCE_SHARE` around its
    centre, in shares of the input's shorter side; 0 inside. The published models have no such
    term.

    Args:
        detector: whose points they are.
        sampling_locations: `(B, G, Hk, Wk, 2)`, (y, x).
        batch: the images.
    """
    size = batch.pixels.shape[1], batch.pixels.shape[2]
    points = pixels_xy(detector, sampling_locations, size)
    missed = []
    for points_xy, of_image in zip(points, batch.objects, strict=True):
        start, end = of_image.boxes[:, :2], of_image.boxes[:, 2:]
        away = (points_xy[:, None] - (start + end) / 2).abs() - GUIDANCE_SHARE * (end - start) / 2
        missed.append(torch.linalg.vector_norm(F.relu(away), dim=-1).amin(1))
    return torch.stack(missed).mean() / min(size)


def pixels_xy(
    detector: Detector, sampling_locations: Tensor, image_size: tuple[int, int]
) -> Tensor:
    """Points `(B, N, 2)` of the last stage in pixels of the input `(H, W)`, (x, y)."""
    config = detector.config.backbone
    stride, first = config.cell_geometry(3)
    cells = torch.tensor(config.map_size(3, image_size))
    pixels_yx = first + stride * (cells - 1) / 2 * (sampling_locations.flatten(1, -2) + 1)
    return pixels_yx.flip(-1)
