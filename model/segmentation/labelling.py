"""From logits at a quarter of the input's size to a label for every pixel of the image.

Officially logits are resized twice, to the size of the input and to that of the image, and the
largest one decides. For a photo of 12 megapixels those would be 7 GB. Every pixel depends on a few
cells around it, so the same is computed here in strips of rows, each in a few megabytes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Values of a strip, four bytes each. A few tensors of that size exist at a time.
STRIP = 1 << 21
_MORE_ON_CUDA = 8  # times; every strip is some twenty launches
# Of the largest logit: by how much rounding can move a value that is interpolated.
ROUNDING = 1e-5
# By how much a logit is below another one where its probability is a millionth of a hundredth.
NEGLIGIBLE = 18.0


class Pass(NamedTuple):
    """What one forward pass says of an image.

    Attributes:
        logits: `(h, w, K)`, float32.
        input_size: `(H, W)` of the input, pixels.
        mirrored: whether the network saw the image mirrored from left to right.
    """

    logits: Tensor
    input_size: tuple[int, int]
    mirrored: bool = False


class Segmentation(NamedTuple):
    """What every pixel of an image is.

    Attributes:
        labels: `(H, W)`, class indices from 0; uint8, or int16 of more than 256 classes.
        probabilities: `(H, W)`, float32, of that class, where they were asked for.
        margins: `(H, W)`, float32, by how much they are above those of the next class, likewise.
    """

    labels: Tensor
    probabilities: Tensor | None = None
    margins: Tensor | None = None


class Strip(NamedTuple):
    """What the pixels of some rows of an image are.

    Attributes:
        rows: of the image.
        labels: `(rows, W)`, class indices, int64.
        probabilities: `(rows, W)`, as in `Segmentation`.
        margins: `(rows, W)`, likewise.
    """

    rows: slice
    labels: Tensor
    probabilities: Tensor | None = None
    margins: Tensor | None = None


@torch.inference_mode()
def label_pixels(
    passes: Sequence[Pass], image_size: tuple[int, int], *, confidence: bool = False
) -> Segmentation:
    """Label every pixel of an image.

    The largest logit of a pass decides; of several, the largest mean of their probabilities. Of
    equals the lowest index is taken.

    Args:
        passes: over the same image, with the same classes.
        image_size: `(H, W)` of the image, pixels.
        confidence: ask for probabilities and margins too.
    """
    labels = empty_labels(passes, image_size)
    measured = image_size if confidence else (0, 0)
    probabilities, margins = (torch.empty(measured, device=labels.device) for _ in range(2))
    for strip in label_strips(passes, image_size, confidence=confidence):
        labels[strip.rows] = strip.labels.to(labels.dtype)
        if strip.probabilities is not None and strip.margins is not None:
            probabilities[strip.rows], margins[strip.rows] = strip.probabilities, strip.margins
    return Segmentation(labels, *((probabilities, margins) if confidence else ()))


def empty_labels(passes: Sequence[Pass], image_size: tuple[int, int]) -> Tensor:
    """Room for labels, where the logits are, of the type that `Segmentation` has for them."""
    logits = passes[0].logits
    index = torch.uint8 if logits.shape[-1] <= 256 else torch.int16
    return torch.empty(image_size, dtype=index, device=logits.device)


def label_strips(
    passes: Sequence[Pass], image_size: tuple[int, int], *, confidence: bool = False
) -> Iterator[Strip]:
    """What `label_pixels` does, a strip of rows at a time from the top; in inference mode."""
    logits = passes[0].logits
    classes, on_cpu = logits.shape[-1], logits.device.type == "cpu"
    values = STRIP if on_cpu else STRIP * _MORE_ON_CUDA
    resizings = [_TwoResizings(one, image_size) for one in passes]
    every = slice(0, image_size[0])
    # Which classes contend is known on the host alone, so a GPU does without: to wait for it would
    # take longer.
    if len(resizings) == 1 and on_cpu:
        (one,) = resizings
        for band in _parts(every, one.rows_of_cell):
            contenders = one.contenders(band, NEGLIGIBLE if confidence else 0.0)
            for rows in _parts(band, values // (len(contenders) * one.values_of_row)):
                strip = _strip(rows, [one.logits(rows, contenders)], confidence=confidence)
                yield strip._replace(labels=contenders[strip.labels])
        return
    for rows in _parts(every, values // (classes * max(one.values_of_row for one in resizings))):
        yield _strip(rows, [one.logits(rows) for one in resizings], confidence=confidence)


def _strip(rows: slice, each: Sequence[Tensor], *, confidence: bool) -> Strip:
    """Rows of an image from the logits of each pass; the labels count the classes of the logits."""
    if len(each) == 1 and not confidence:
        return Strip(rows, each[0].argmax(-1))
    mean = _mean_probabilities(each)
    largest = (each[0] if len(each) == 1 else mean).argmax(-1, keepdim=True)
    if not confidence:
        return Strip(rows, largest.squeeze(-1))
    own = mean.gather(-1, largest).squeeze(-1)
    next_best = mean.scatter_(-1, largest, 0).amax(-1)
    return Strip(rows, largest.squeeze(-1), own, own - next_best)


def _parts(rows: slice, count: int) -> Iterator[slice]:
    """Rows, so many at a time, but at least one."""
    for top in range(rows.start, rows.stop, max(1, count)):
        yield slice(top, min(top + max(1, count), rows.stop))


def full_logits(one: Pass, image_size: tuple[int, int]) -> Tensor:
    """Logits `(H, W, K)` of every pixel, which take 600 bytes each of 150 classes."""
    return _TwoResizings(one, image_size).logits(slice(0, image_size[0]))


def _mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    mean = logits[0].softmax(-1)
    for others in logits[1:]:
        mean = mean + others.softmax(-1)
    return mean / len(logits)


class _Axis(NamedTuple):
    """Between which two cells each cell of a resized axis lies.

    Attributes:
        first: `(n,)`.
        second: `(n,)`, the next, or the last where there is no next.
        weight: `(n,)`, of the second.
    """

    first: Tensor
    second: Tensor
    weight: Tensor

    @classmethod
    def resizing(cls, size: int, resized: int) -> "_Axis":
        """The cells of an axis of one size at another, in the arithmetic of torch."""
        cells = torch.arange(resized, dtype=torch.float32)
        at = ((cells + 0.5) * (size / resized) - 0.5).clamp(min=0)
        first = at.long().clamp(max=size - 1)
        return cls(first, (first + 1).clamp(max=size - 1), at - first)

    def part(self, cells: slice) -> tuple[slice, "_Axis"]:
        """Some of the cells: what they read, and where in that."""
        first, second, weight = (of_all[cells] for of_all in self)
        begin, end = int(first[0]), int(second[-1]) + 1
        return slice(begin, end), _Axis(first - begin, second - begin, weight)

    def along(self, maps: Tensor, dim: int) -> Tensor:
        """The maps `(H, W, K)`, resized along one of the first two axes."""
        first, second, weight = (part.to(maps.device, non_blocking=True) for part in self)
        weight = weight.view(-1, 1, 1).transpose(0, dim)
        # Products and sums are rounded one by one, so a value does not depend on its strip.
        below = maps.index_select(dim, second).mul_(weight)
        return maps.index_select(dim, first).mul_(1 - weight).add_(below)


class _TwoResizings:
    """Logits of one pass at the size of the input, and those at the size of the image.

    Attributes:
        values_of_row: how many values of each class a row of the image takes on its way.
        rows_of_cell: how many rows of the image a cell has, rounded up.
    """

    def __init__(self, one: Pass, image_size: tuple[int, int]) -> None:
        self._cells, self._mirrored = one.logits, one.mirrored
        (h, w), (H, W), (height, width) = one.logits.shape[:2], one.input_size, image_size
        self._rows = _Axis.resizing(h, H), _Axis.resizing(H, height)
        self._columns = _Axis.resizing(w, W), _Axis.resizing(W, width)
        self.values_of_row = max(width, W * -(-H // height))
        self.rows_of_cell = -(-height // h)

    def logits(self, rows: slice, classes: Tensor | None = None) -> Tensor:
        """Logits `(rows, W, K)` of rows of the image, of some classes or of all."""
        (to_input, to_image), (across_input, across_image) = self._rows, self._columns
        of_input, to_image = to_image.part(rows)
        of_cells, to_input = to_input.part(of_input)
        cells = self._cells[of_cells]
        if classes is not None and len(classes) < cells.shape[-1]:
            cells = cells.index_select(-1, classes)
        at_input = across_input.along(to_input.along(cells, 0), 1)
        at_image = across_image.along(to_image.along(at_input, 0), 1)
        return at_image.flip(1) if self._mirrored else at_image

    def contenders(self, rows: slice, slack: float = 0.0) -> Tensor:
        """The classes, in order, that can have the largest logit somewhere in rows of the image.

        A pixel lies between cells, three of a row at most, and so does its logit. A class that is
        at its highest below what another one has at its lowest, around every pixel, is out.

        Args:
            rows: of the image.
            slack: by how much a logit may be below the largest.
        """
        to_input, to_image = self._rows
        of_cells, _ = to_input.part(to_image.part(rows)[0])
        cells = self._cells[of_cells]
        highest = _highest_of_three(cells.amax(0))
        lowest = -_highest_of_three(-cells.amin(0))
        bar = lowest.amax(0) - ROUNDING * cells.abs().amax() - slack
        return (~(highest < bar)).any(1).nonzero().flatten()


def _highest_of_three(cells: Tensor) -> Tensor:
    """The highest `(K, w)` of each cell and its neighbours, of `(w, K)`."""
    return F.max_pool1d(cells.T.unsqueeze(0), 3, 1, 1).squeeze(0)
