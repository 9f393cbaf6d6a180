"""How a GPU runs a classifier: a captured graph for each bucket."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from model.attention_weights import AttentionWeights
from service.engine.asked import Layers, by_layer, cells_of, flat
from service.engine.classify import Classify, Ranked
from service.engine.device import Device
from service.engine.graphs import Capture, fused
from service.engine.items import ClassificationInput, Wanted
from service.engine.pipeline import Pipeline
from service.engine.slots import Row
from service.metrics.model import ModelMetrics


class InGraphs:
    """Runs batches of a classifier as graphs that were captured ahead.

    Those with attention are captured when they come again, and are not compiled. To be made in the
    thread of the device.

    Args:
        compiled: whether `torch.compile` fuses what a graph captures.
        capture: how a graph is captured.

    Raises:
        RuntimeError: a graph cannot be captured.
    """

    def __init__(
        self,
        classify: Classify,
        buckets: Sequence[int],
        device: Device,
        metrics: ModelMetrics,
        *,
        compiled: bool,
        capture: Capture,
    ) -> None:
        plain = fused(classify, len(buckets)) if compiled else classify

        def work(pixels: Tensor, *cells: Tensor, layers: Layers = ()) -> Ranked:
            ranked: Ranked = classify(pixels, *cells, layers=layers) if layers else plain(pixels)
            return ranked

        self._pipeline = Pipeline[Ranked](device, work, buckets, metrics, capture=capture)
        self._image_size = classify.model.config.image_size

    def capture_ahead(self) -> Iterator[None]:
        """Capture the graphs, one in each step; in the thread of the device.

        Raises:
            RuntimeError: a graph cannot be captured.
        """
        return self._pipeline.capture_ahead([(np.zeros((*self._image_size, 3), np.uint8),)])

    def forget(self) -> None:
        """Drop the graphs, and count them no more."""
        self._pipeline.forget()

    @property
    def graphs(self) -> int:
        """How many there are."""
        return len(self._pipeline)

    @property
    def graphs_bytes(self) -> int:
        """Memory of the device that they took."""
        return self._pipeline.graphs_bytes

    async def settle(self) -> None:
        """Capture a graph that batches called for."""
        await self._pipeline.settle()

    def launch(
        self, batch: Sequence[ClassificationInput], wanted: Wanted, _: int
    ) -> Callable[[], Sequence[Ranked]]:
        """Begin a batch; the function that is returned waits for its results, in one part."""
        layers = wanted.attention
        results = self._pipeline.launch(
            [_row(item, layers) for item in batch], partial(_select, wanted=wanted), layers
        )
        return lambda: [_ranked(results(), wanted)]

    def warm_up(self, batch: Sequence[ClassificationInput], wanted: Wanted) -> None:
        """Run a batch that counts nowhere, without attention."""
        self._pipeline.warm_up([_row(item, ()) for item in batch], partial(_select, wanted=wanted))


def _row(item: ClassificationInput, layers: Layers) -> Row:
    """What an image gives to each argument of the work."""
    return (item.pixels, cells_of(item, layers)) if layers else (item.pixels,)


def _select(ranked: Ranked, *, wanted: Wanted) -> list[Tensor]:
    locations = ranked.sampling_locations if wanted.points else ()
    logits = (ranked.logits,) if wanted.logits else ()
    return [ranked.scores, ranked.classes, *logits, *flat(ranked.attention), *locations]


def _ranked(selected: Sequence[Tensor], wanted: Wanted) -> Ranked:
    scores, classes, *others = selected
    logits = others.pop(0) if wanted.logits else scores[:, :0]
    end = len(AttentionWeights._fields) * len(wanted.attention)
    return Ranked(scores, classes, logits, tuple(others[end:]), by_layer(others[:end]))
