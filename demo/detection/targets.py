"""What a detector should have answered: targets of anchors, regions and masks.

As mmdetection 2.26 assigns them (Ren et al., arXiv:1506.01497, section 3.1.2). Boxes are corners
`(x1, y1, x2, y2)`, pixels of the padded input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BACKGROUND, IGNORED = -1, -2


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU `(N, M)` of boxes `(N, 4)` with others `(M, 4)` that have an area."""
    start = torch.maximum(boxes[:, None, :2], others[:, :2])
    end = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    inter = (end - start).clamp(min=0).prod(-1)
    areas, other_areas = ((of[:, 2:] - of[:, :2]).prod(-1) for of in (boxes, others))
    return inter / (areas[:, None] + other_areas - inter)


def assign(overlap: Tensor, low: float, high: float, *, best_of_each: bool) -> Tensor:
    """The object of each box.

    Args:
        overlap: `(N, M)`, of boxes with objects; there is an object.
        low: a box whose every overlap is below it is background.
        high: from here on a box belongs to its best object; between the two it is ignored.
        best_of_each: whether the best boxes of an object belong to it from `low` on.

    Returns:
        `(N,)`: an object, `BACKGROUND` or `IGNORED`.
    """
    best, index = overlap.max(1)
    assigned = index.masked_fill(best < high, IGNORED).masked_fill(best < low, BACKGROUND)
    if best_of_each:
        top = overlap.amax(0)
        box, found = ((overlap == top) & (top >= low)).nonzero(as_tuple=True)
        assigned[box] = found
    return assigned


def sample(
    assigned: Tensor, count: int, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of random boxes with an object and of random boxes of the background.

    Args:
        assigned: `(N,)`, see `assign`.
        count: of both together, as far as there are so many.
        share: the largest share of those with an object.
        generator: of the random numbers.
    """
    positive = _some(assigned >= 0, int(count * share), generator)
    return positive, _some(assigned == BACKGROUND, count - len(positive), generator)


def _some(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    index = mask.nonzero().squeeze(1)
    return index[torch.randperm(len(index), generator=generator)[:count]]


def encode(boxes: Tensor, targets: Tensor, stds: Sequence[float] = ()) -> Tensor:
    """The deltas `(N, 4)` that `decode` turns from boxes `(N, 4)` into targets `(N, 4)`."""
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, 2:] + targets[:, :2] - boxes[:, 2:] - boxes[:, :2]) / (2 * size)
    deltas = torch.cat((shift, (target_size / size).log()), -1)
    return deltas / deltas.new_tensor(stds) if stds else deltas


def mask_targets(instances: Tensor, objects: Tensor, boxes: Tensor, cells: int) -> Tensor:
    """What regions should see of their objects.

    Args:
        instances: `(H, W)`, see `demo.detection.scenes.Scene`.
        objects: `(R,)`, of each region.
        boxes: `(R, 4)`, inside the image.
        cells: side of a mask.

    Returns:
        `(R, cells, cells)`: 1 where the object is seen at the centre of the cell, 0 elsewhere.
    """
    centres = (torch.arange(cells) + 0.5) / cells
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(1)
    H, W = instances.shape
    rows = (y1 + (y2 - y1) * centres).long().clamp(max=H - 1)
    columns = (x1 + (x2 - x1) * centres).long().clamp(max=W - 1)
    seen = instances[rows.unsqueeze(2), columns.unsqueeze(1)]
    return (seen == objects.view(-1, 1, 1) + 1).float()
