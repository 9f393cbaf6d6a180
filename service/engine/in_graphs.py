"""How a GPU runs a classifier: a captured graph for each bucket."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.engine.classify import Classify, Ranked
from service.engine.device import Device
from service.engine.graphs import Capture, fused
from service.engine.items import Wanted
from service.engine.pipeline import Pipeline
from service.metrics import ModelMetrics


class InGraphs:
    """Runs batches of a classifier as graphs that were captured ahead.

    To be made in the thread of the device.

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
        work = fused(classify, len(buckets)) if compiled else classify
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

    def launch(
        self, images: Sequence[NDArray[np.uint8]], wanted: Wanted
    ) -> Callable[[], Sequence[Ranked]]:
        """Begin a batch; the function that is returned waits for its results, in one part."""
        results = self._pipeline.launch(
            [(image,) for image in images], partial(_select, wanted=wanted)
        )
        return lambda: [_ranked(results())]

    def warm_up(self, images: Sequence[NDArray[np.uint8]], wanted: Wanted) -> None:
        """Run a batch that counts nowhere."""
        self._pipeline.warm_up([(image,) for image in images], partial(_select, wanted=wanted))


def _select(ranked: Ranked, *, wanted: Wanted) -> list[Tensor]:
    return [ranked.scores, ranked.classes, *(ranked.sampling_locations if wanted.points else ())]


def _ranked(selected: Sequence[Tensor]) -> Ranked:
    scores, classes, *locations = selected
    return Ranked(scores, classes, tuple(locations))
