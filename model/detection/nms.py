"""Non-maximum suppression, in batches of fixed shape.

As in mmcv 1.4: greedy by descending score; a box is removed by a kept one if their IoU is above
the threshold. Boxes of different groups (classes, or levels of a pyramid) are kept apart by
moving them apart, in float32, with the rounding that this has.

What differs from image to image, how many boxes there are and how many remain, is a count beside
rows of one length. With the kernel (`model.kernels.nms`) nothing here waits for the device. On the
CPU, where counts are known for nothing, rows are no longer than they have to be.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import kernels

Floats = NDArray[np.floating]

_BLOCK = 128  # rows of the matrix of IoUs that are computed at once


@dataclass(frozen=True)
class Rows:
    """Some rows of every image, in an order.

    Attributes:
        indices: `(B, R)`, int64; past the count those of any rows.
        counts: `(B,)`, int64: how many of each `R` are real.
    """

    indices: Tensor
    counts: Tensor

    @cached_property
    def real(self) -> Tensor:
        """Which rows are real, `(B, R)`."""
        return until(self.counts, self.indices.shape[1])

    @cached_property
    def _absent(self) -> Tensor:
        return ~self.real

    def of(self, values: Tensor) -> Tensor:
        """These rows `(B, R, ...)` of `(B, N, ...)`, and zeros past the count."""
        trailing = values.shape[2:]
        shape = (*self.indices.shape, *(1 for _ in trailing))
        chosen = values.gather(1, self.indices.view(shape).expand(-1, -1, *trailing))
        return chosen.masked_fill(self._absent.view(shape), 0)


def nms(boxes: Tensor, scores: Tensor, valid: Tensor, threshold: float, limit: int) -> Rows:
    """The boxes of every image that remain, best first; ties stay in their order.

    Args:
        boxes: `(B, N, 4)`, corners; see `moved_apart` for groups.
        scores: `(B, N)`; a score that is no number comes last.
        valid: `(B, N)`, which boxes there are.
        threshold: the largest IoU that two boxes may have.
        limit: the search in an image ends with so many.
    """
    order = _best_first(scores, valid)
    ordered = boxes.gather(1, order.unsqueeze(-1).expand_as(boxes))
    counts = valid.sum(1)
    if kernels.usable(ordered):
        from model.kernels.nms import search  # noqa: PLC0415

        kept = Rows(*search(ordered, counts, threshold, limit))
    else:
        kept = _search(ordered, counts, threshold, limit)
    return Rows(order.gather(1, kept.indices), kept.counts)


def moved_apart(boxes: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Boxes `(B, N, 4)` so moved that those of different groups do not touch.

    Args:
        boxes: `(B, N, 4)`, coordinates from 0.
        groups: `(B, N)` or `(N,)`, from 0.
        valid: `(B, N)`; the largest coordinate of these boxes tells how far is apart.
    """
    largest = boxes.masked_fill(~valid.unsqueeze(-1), -torch.inf).amax((1, 2))
    apart = groups.to(boxes.dtype) * (largest + 1).unsqueeze(-1)
    return boxes + apart.unsqueeze(-1)


def best_of(scores: Tensor, valid: Tensor, most: int) -> Rows:
    """The best of what is valid in every image, ties in their order.

    Args:
        scores: `(B, N)`; a score that is no number comes last.
        valid: `(B, N)`.
        most: how many of an image at most.
    """
    counts = valid.sum(1).clamp(max=most)
    return Rows(_best_first(scores, valid)[:, : needed(counts, most)], counts)


def first_of(chosen: Tensor, most: int) -> Rows:
    """Where each row is true, from the first column on.

    Args:
        chosen: `(B, N)`, bool.
        most: what no row has more of; the shape depends on it where it may not on the data.
    """
    counts = chosen.sum(1)
    # One at least, so that there is something to reduce.
    columns = max(needed(counts, most), 1)
    place = (chosen.cumsum(1) - 1).masked_fill(~chosen, columns)
    every = torch.arange(chosen.shape[1], device=chosen.device).expand_as(place)
    # What is not chosen goes to one more column.
    index = place.new_zeros(len(place), columns + 1).scatter_(1, place, every)
    return Rows(index[:, :columns], counts)


def needed(counts: Tensor, most: int) -> int:
    """How long the rows of a batch have to be.

    On the CPU as long as its largest count. Anywhere else asking for a count would wait for the
    device, so that it is the `most` that it can be. No other shape depends on the data.
    """
    return int(counts.max()) if counts.is_cpu else most


def until(counts: Tensor, columns: int) -> Tensor:
    """`(B, columns)`, true below each of the counts `(B,)`."""
    return torch.arange(columns, device=counts.device) < counts.unsqueeze(-1)


def _best_first(scores: Tensor, valid: Tensor) -> Tensor:
    """The order `(B, N)` of descending scores, ties as they are, and last what is not valid."""
    losses = (-scores).nan_to_num(torch.inf, torch.inf, -torch.inf)
    return losses.masked_fill(~valid, torch.nan).argsort(dim=1, stable=True)


def _search(boxes: Tensor, counts: Tensor, threshold: float, limit: int) -> Rows:
    """What `model.kernels.nms.search` does, on the CPU, for boxes on any device."""
    of_images = zip(boxes.numpy(force=True), counts.tolist(), strict=True)
    kept = [_search_image(ordered[:count], threshold, limit) for ordered, count in of_images]
    found = torch.tensor([len(positions) for positions in kept], device=counts.device)
    columns = needed(found, limit)
    padded = [positions + [0] * (columns - len(positions)) for positions in kept]
    index = torch.tensor(padded, dtype=torch.int64, device=counts.device)
    return Rows(index.view(len(kept), columns), found)


def _search_image(boxes: Floats, threshold: float, limit: int) -> list[int]:
    """The rows of `(N, 4)`, best first, that a greedy search keeps."""
    kept: list[int] = []
    # What is suppressed by an earlier block is dropped before the next one.
    waiting = np.arange(len(boxes))
    while len(waiting) and len(kept) < limit:
        left = boxes[waiting]
        suppressed = _iou(left[:_BLOCK], left) > threshold
        alive = np.ones(len(waiting), bool)
        for row, best in enumerate(waiting[:_BLOCK]):
            if alive[row]:
                kept.append(int(best))
                alive &= ~suppressed[row]
        waiting = waiting[_BLOCK:][alive[_BLOCK:]]
    return kept[:limit]


def _iou(rows: Floats, columns: Floats) -> Floats:
    """IoU `(R, C)` of boxes `(R, 4)` with boxes `(C, 4)`; NaN for two without any area."""
    left, top, right, bottom = (
        choose(rows[:, None, side], columns[:, side])
        for side, choose in enumerate((np.maximum, np.maximum, np.minimum, np.minimum))
    )
    inter = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    union = _areas(rows)[:, None] + _areas(columns) - inter
    with np.errstate(invalid="ignore"):
        return inter / union


def _areas(boxes: Floats) -> Floats:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
