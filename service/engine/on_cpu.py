"""How a CPU runs a classifier: passes that were traced once, shared among its cores."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.attention_weights import AttentionWeights
from model.cost import flops
from model.dat import DAT
from model.geometry import MOST_QUERIES
from model.packing import pack
from model.tracing import trace
from service.engine.asked import Layers, cells_of
from service.engine.classify import Classify, Ranked
from service.engine.device import Device
from service.engine.graphs import pick_bucket
from service.engine.items import ClassificationInput, Wanted
from service.engine.openvino import OpenVinoClassify
from service.metrics import ModelMetrics
from service.settings import Backend

# Multiply-adds of an image for each of the threads of a CPU that compute it together: with fewer
# they wait for each other longer than they compute. Measured with two; beyond that it is the time
# between two operations, of which there are hundreds, that stays the same.
WORTH_A_THREAD = 250_000_000
# Sets of layers for whose attention a pass stays traced; each holds some megabytes of geometry.
ATTENTION_KEPT = 4


class OnCpu:
    """Runs batches of a classifier in the lanes of a CPU, or in OpenVINO.

    To be made in the thread of the device. Sampling points are there after a pass, so nothing
    depends on whether they are wanted. A pass with attention is traced when it is first wanted.
    OpenVINO computes none: images that want it are computed without it, the others as ever.

    Attributes:
        graphs: none.
        graphs_bytes: likewise.
    """

    graphs = 0
    graphs_bytes = 0

    def __init__(
        self,
        classify: Classify,
        buckets: Sequence[int],
        device: Device,
        metrics: ModelMetrics,
        *,
        backend: Backend,
        dtype: torch.dtype,
        cache: Path | None,
    ) -> None:
        image_size = classify.model.config.image_size
        self._buckets = buckets
        self._metrics = metrics
        self._staging = torch.zeros((buckets[-1], *image_size, 3), dtype=torch.uint8)
        self._lanes = _InLanes(classify, device, self._staging)
        self._openvino: OpenVinoClassify | None = None
        if backend == "openvino":
            self._openvino = OpenVinoClassify(
                classify, image_size, buckets, device.threads, cache, dtype=dtype
            )
        else:
            if isinstance(classify.model, DAT):
                pack(classify.model)
            self._lanes.trace_ahead(buckets)

    async def settle(self) -> None:
        """Nothing is left to do."""

    def launch(
        self, batch: Sequence[ClassificationInput], wanted: Wanted
    ) -> Callable[[], Sequence[Ranked]]:
        """Run a batch; the function that is returned has its parts, each of some images."""
        padding = pick_bucket(len(batch), self._buckets) - len(batch)
        parts = self._run(batch, wanted.attention)
        self._metrics.real_rows.inc(len(batch))
        self._metrics.padding_rows.inc(padding)
        self._metrics.replays["eager"].inc()
        return lambda: parts

    def forget(self) -> None:
        """Nothing: there are no graphs."""

    def warm_up(self, batch: Sequence[ClassificationInput], _: Wanted) -> None:
        """Run a batch that counts nowhere, without attention."""
        self._run(batch, ())

    def _run(self, batch: Sequence[ClassificationInput], layers: Layers) -> Sequence[Ranked]:
        if self._openvino is not None:
            return self._run_in_openvino(batch, layers)
        # Rows past the batch keep what an earlier one left.
        rows = self._stage(batch, pick_bucket(len(batch), self._buckets))
        return self._lanes(rows, layers, _cells(batch, layers, len(rows)))

    def _run_in_openvino(
        self, batch: Sequence[ClassificationInput], layers: Layers
    ) -> Sequence[Ranked]:
        assert self._openvino is not None, "this is a bug"
        asking = [item for item in batch if item.wanted.attention]
        plain = [item for item in batch if not item.wanted.attention]
        parts: list[Ranked] = []
        if plain:
            ranked = self._openvino(self._stage(plain, pick_bucket(len(plain), self._buckets)))
            parts += _rows(ranked)[: len(plain)]
        if asking:
            rows = self._stage(asking, len(asking))
            for ranked in self._lanes(rows, layers, _cells(asking, layers, len(asking))):
                parts += _rows(ranked)
        by_item = dict(zip(map(id, [*plain, *asking]), parts, strict=True))
        return [by_item[id(item)] for item in batch]

    def _stage(self, batch: Sequence[ClassificationInput], size: int) -> Tensor:
        rows = self._staging[:size]
        for row, item in zip(rows.numpy(), batch, strict=False):
            row[...] = item.pixels
        return rows


def _cells(batch: Sequence[ClassificationInput], layers: Layers, size: int) -> Tensor:
    """`(size, len(layers), MOST_QUERIES)`, of the first cell where there is no image."""
    cells = np.zeros((size, len(layers), MOST_QUERIES), np.int64)
    for row, item in zip(cells, batch, strict=False):
        row[...] = cells_of(item, layers)
    return torch.from_numpy(cells)


def _rows(ranked: Ranked) -> list[Ranked]:
    """Every row as a part of its own."""
    return [_part(ranked, slice(row, row + 1)) for row in range(len(ranked.scores))]


def _part(ranked: Ranked, rows: slice) -> Ranked:
    return Ranked(
        ranked.scores[rows],
        ranked.classes[rows],
        ranked.logits[rows],
        tuple(layer[rows] for layer in ranked.sampling_locations),
        tuple(AttentionWeights(*(part[rows] for part in layer)) for layer in ranked.attention),
    )


class _InLanes:
    """A classifier as passes that were traced, for shares of a batch."""

    def __init__(self, classify: Classify, device: Device, example: Tensor) -> None:
        self._classify = classify
        self._lanes = device.lanes
        self._example = example
        self._team = max(1, flops(classify.model.config) // WORTH_A_THREAD)
        self._plain: dict[int, Callable[..., Ranked]] = {}
        self._explaining = OrderedDict[Layers, dict[int, Callable[..., Ranked]]]()

    def trace_ahead(self, buckets: Sequence[int]) -> None:
        """Trace all shares of such batches, without attention."""
        for size in buckets:
            self._trace(self._plain, size, ())

    def __call__(self, pixels: Tensor, layers: Layers, cells: Tensor) -> Sequence[Ranked]:
        """Compute a batch, with the attention of these layers."""
        if not layers:
            plain = self._plain
            return self._map(lambda rows: plain[_length(rows)](pixels[rows]), len(pixels))
        of_layers = self._explaining.setdefault(layers, {})
        self._explaining.move_to_end(layers)
        if len(self._explaining) > ATTENTION_KEPT:
            self._explaining.popitem(last=False)
        traced = self._trace(of_layers, len(pixels), layers)
        return self._map(lambda rows: traced[_length(rows)](pixels[rows], cells[rows]), len(pixels))

    def _map(self, compute: Callable[[slice], Ranked], images: int) -> Sequence[Ranked]:
        return self._lanes.map(compute, images, team=self._team)

    def _trace(
        self, traced: dict[int, Callable[..., Ranked]], images: int, layers: Layers
    ) -> dict[int, Callable[..., Ranked]]:
        """Trace what is missing for the shares of a batch."""
        for size in self._lanes.share_sizes(images, team=self._team) - traced.keys():
            examples = [self._example[:size]]
            if layers:
                examples.append(torch.zeros((size, len(layers), MOST_QUERIES), dtype=torch.int64))
            traced[size] = trace(partial(self._classify, layers=layers), *examples)
        return traced


def _length(rows: slice) -> int:
    length: int = rows.stop - rows.start
    return length
