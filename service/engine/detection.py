"""One detector on its device: loaded, warmed up, and run in batches of equally large images."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from model.detection.detector import Detector, ExplainedFound
from model.detection.normalise import Normalise
from service.engine.asked import Layers, cells_of
from service.engine.dense import Beside, DenseEngine, Size, beside
from service.engine.items import DetectionInput, DetectionOutput, Wanted, wanted_of
from service.engine.slots import Row


class DetectionEngine(DenseEngine[Detector, ExplainedFound]):
    """Runs batches of one detector on a device, from pixels to what was found."""

    @override
    def _work(self, network: Detector, device: torch.device) -> Callable[..., ExplainedFound]:
        normalise = Normalise(self.dtype).to(device)

        def find(
            pixels: Tensor,
            resized: Tensor,
            scales: Tensor,
            cells: Tensor | None = None,
            *,
            layers: Layers = (),
        ) -> ExplainedFound:
            images = normalise(pixels, resized)
            return network.find(images, resized, scales, layers, cells)

        return find

    @override
    def _blank_of(self, size: Size) -> DetectionInput:
        return DetectionInput(np.zeros((*size, 3), np.uint8), size, (1.0, 1.0))

    @override
    def _row(self, item: DetectionInput, layers: Layers = ()) -> Row:
        row = (
            item.pixels,
            np.array(item.resized, np.int64),
            np.array(item.scale_xy, np.float32),
        )
        return (*row, cells_of(item, layers)) if layers else row

    @override
    def _select(self, outputs: ExplainedFound, wanted: Wanted) -> list[Tensor]:
        found, locations, attention = outputs
        explained = beside(locations, attention, wanted)
        return [part for part in (*found, *explained) if part is not None]

    @override
    def launch(
        self, batch: Sequence[DetectionInput], cores: int | None = None
    ) -> Callable[[], list[DetectionOutput]]:
        wanted = wanted_of(batch)
        results = self._loaded.launch(
            [self._row(item, wanted.attention) for item in batch],
            partial(self._select, wanted=wanted),
            wanted.attention,
        )
        assert self._network is not None
        masks = self._network.config.has_masks
        return lambda: _split(results(), batch, wanted.attention, masks=masks)


def _split(
    selected: Sequence[Tensor], batch: Sequence[DetectionInput], layers: Layers, *, masks: bool
) -> list[DetectionOutput]:
    """The output of each image of a batch."""
    boxes, scores, labels, counts, *others = selected
    probabilities = others.pop(0).numpy() if masks else None
    explained = Beside(others, layers)
    return [
        DetectionOutput(
            boxes.numpy()[row, :count],
            scores.numpy()[row, :count],
            labels.numpy()[row, :count],
            None if probabilities is None else probabilities[row, :count],
            explained.points(item, row),
            explained.attention(item, row),
        )
        for row, (item, count) in enumerate(zip(batch, counts.tolist(), strict=True))
    ]
