"""One segmenter on its device: loaded, warmed up, and run in batches of equally large images.

The network has a graph for each size of its input. The labels are made from its logits image by
image, in strips of rows, because every image has a size of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from model.normalise import Normalise
from model.segmentation.labelling import Pass, empty_labels, label_strips
from model.segmentation.segmenter import ExplainedLogits, Segmenter
from service.engine.asked import Layers, cells_of
from service.engine.dense import Beside, DenseEngine, Size, beside
from service.engine.items import SegmentationInput, SegmentationOutput, Wanted, wanted_of
from service.engine.slots import Row

_CHANNELS = 3
_SUREST = 255  # of a margin in a byte


class _View(NamedTuple):
    """How the network sees the images of a batch in one pass."""

    scale: int
    mirrored: bool


class SegmentationEngine(DenseEngine[Segmenter, ExplainedLogits]):
    """Runs batches of one segmenter on a device, from pixels to a label for each."""

    @override
    def _work(self, network: Segmenter, device: torch.device) -> Callable[..., ExplainedLogits]:
        normalise = Normalise(self.dtype).to(device)

        def see(
            pixels: Tensor, cells: Tensor | None = None, *, layers: Layers = ()
        ) -> ExplainedLogits:
            seen = network.forward_explained(normalise(pixels), layers, cells)
            return seen._replace(logits=seen.logits.float())

        return see

    @override
    def _blank_of(self, size: Size) -> SegmentationInput:
        return SegmentationInput((np.zeros((*size, _CHANNELS), np.uint8),), size)

    @override
    def _row(self, item: SegmentationInput, layers: Layers = ()) -> Row:
        return _row_of(item, _View(item.explained, mirrored=False), layers)

    @override
    def _select(self, outputs: ExplainedLogits, wanted: Wanted) -> list[Tensor]:
        return [outputs.logits, *beside(outputs.sampling_locations, outputs.attention, wanted)]

    @override
    def cost(self, item: SegmentationInput) -> int:
        """All scales are seen, and every pixel of the image is labelled."""
        seen = sum(scale.size for scale in item.scales) * (2 if item.mirrored else 1)
        height, width = item.image_size
        return seen + height * width * _CHANNELS

    @override
    def launch(
        self, batch: Sequence[SegmentationInput], cores: int | None = None
    ) -> Callable[[], list[SegmentationOutput]]:
        under_way = _Batch(batch)
        needed = []
        for view in under_way.views:
            layers = under_way.layers(view)
            rows = [_row_of(item, view, layers) for item in batch]
            results = self._loaded.launch(rows, partial(under_way.passed, view), layers)
            if view in (under_way.explained, under_way.views[-1]):
                needed.append(results)
        return lambda: under_way.outputs([each() for each in needed])


class _Batch:
    """A batch between its passes: what they said, until the last one is there.

    Attributes:
        views: how the network sees it, pass by pass.
        explained: of which of them points and attention are.
    """

    def __init__(self, items: Sequence[SegmentationInput]) -> None:
        self._items = items
        self._wanted = wanted_of(items)
        self._passes: list[list[Pass]] = [[] for _ in items]
        first = items[0]
        self.views = [
            _View(scale, mirrored)
            for scale in range(len(first.scales))
            for mirrored in (False, True)[: 1 + first.mirrored]
        ]
        self.explained = _View(first.explained, mirrored=False)

    def layers(self, view: _View) -> Layers:
        """Whose attention a pass is asked for."""
        return self._wanted.attention if view == self.explained else ()

    def passed(self, view: _View, outputs: ExplainedLogits) -> list[Tensor]:
        """Note what a pass said, in the stream of the device.

        Returns:
            What is copied to the host: after the pass that is explained its explanation, and after
            the last one the labels of all images.
        """
        height, width, _ = self._items[0].scales[view.scale].shape
        is_last = view == self.views[-1]
        for passes, logits in zip(self._passes, outputs.logits, strict=False):
            # The next pass may overwrite what a graph gave.
            kept = logits if is_last else logits.clone()
            passes.append(Pass(kept, (height, width), view.mirrored))
        copied: list[Tensor] = []
        if view == self.explained:
            copied += beside(outputs.sampling_locations, outputs.attention, self._wanted)
        if is_last:
            copied.append(torch.stack([_are_finite(passes) for passes in self._passes]))
            labelled = map(_labelled, self._items, self._passes)
            # As of a batch of one, since they differ in size.
            copied += [part.unsqueeze(0) for part in chain.from_iterable(labelled)]
            self._passes.clear()
        return copied

    def outputs(self, copied: Sequence[Sequence[Tensor]]) -> list[SegmentationOutput]:
        """The output of each image, from what `passed` gave for the passes that gave something."""
        tensors = [*chain.from_iterable(copied)]
        start = len(tensors) - sum(1 + len(_parts(item)) for item in self._items)
        explained = Beside(tensors[: start - 1], self._wanted.attention)
        finite = tensors[start - 1].tolist()
        parts = (tensor.squeeze(0).numpy() for tensor in tensors[start:])
        return [
            SegmentationOutput(
                labels=next(parts),
                finite=finite[row],
                **{name: next(parts) for name in _parts(item)},
                sampling_locations=explained.points(item, row),
                attention=explained.attention(item, row),
            )
            for row, item in enumerate(self._items)
        ]


def _row_of(item: SegmentationInput, view: _View, layers: Layers) -> Row:
    pixels = item.scales[view.scale]
    if view.mirrored:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    return (pixels, cells_of(item, layers)) if layers else (pixels,)


def _parts(item: SegmentationInput) -> list[str]:
    """What an output has beside its labels, in order."""
    wanted = {"probabilities": item.probabilities, "margins": item.margins}
    return [name for name, is_wanted in wanted.items() if is_wanted]


def _are_finite(passes: Sequence[Pass]) -> Tensor:
    return torch.stack([one.logits.isfinite().all() for one in passes]).all()


def _labelled(item: SegmentationInput, passes: Sequence[Pass]) -> Iterator[Tensor]:
    """The labels of an image, and what else of `_parts` is wanted."""
    labels = empty_labels(passes, item.image_size)
    of_classes = passes[0].logits.new_zeros(passes[0].logits.shape[-1], dtype=torch.float64)
    measured = item.image_size if item.margins else (0, 0)
    margins = torch.empty(measured, dtype=torch.uint8, device=labels.device)
    confidence = item.probabilities or item.margins
    for strip in label_strips(passes, item.image_size, confidence=confidence):
        labels[strip.rows] = strip.labels.to(labels.dtype)
        if item.probabilities and strip.probabilities is not None:
            sure = strip.probabilities.flatten().double()
            of_classes.index_add_(0, strip.labels.flatten(), sure)
        if item.margins and strip.margins is not None:
            margins[strip.rows] = (strip.margins * _SUREST).round().to(torch.uint8)
    yield labels
    if item.probabilities:
        yield of_classes
    if item.margins:
        yield margins
