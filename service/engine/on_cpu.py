"""How a CPU runs a classifier: passes that were traced once, on all cores or on a part of them."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from model.attention_weights import AttentionWeights
from model.config import DatConfig
from model.cost import flops
from model.dat import DAT
from model.geometry import MOST_QUERIES
from model.packing import pack
from model.swin_config import SwinConfig
from model.tracing import trace
from service.engine.asked import Layers, cells_of
from service.engine.classify import Classify, Ranked
from service.engine.device import Device
from service.engine.graphs import pick_bucket
from service.engine.items import ClassificationInput, Wanted
from service.engine.openvino import OpenVinoClassify
from service.metrics.model import ModelMetrics
from service.settings.engine import Backend
from service.share import Share

# Multiply-adds of an image for each of the threads of a CPU that compute it together: with fewer
# they wait for each other longer than they compute. Measured with two; beyond that it is the time
# between two operations, of which there are hundreds, that stays the same.
WORTH_A_THREAD = 250_000_000
# Images of a batch on a part of the cores, of which a core has enough: with fewer it computes each
# a tenth slower, and more take memory on every core.
_ENOUGH = 2
# Sets of layers for whose attention a pass stays traced; each holds some megabytes of geometry.
ATTENTION_KEPT = 4


def team(config: DatConfig | SwinConfig) -> int:
    """How many threads compute an image faster than fewer do."""
    return max(1, flops(config) // WORTH_A_THREAD)


def share(whole: Share, in_flight: int, free: int, *, team: int, quiet: bool) -> Share:
    """What the next batch takes of a CPU.

    Several large images are computed beside each other, each batch on cores of its own, where none
    waits for another one to end; a single one has all cores that it is worth. A batch of small
    images has all cores, because a pass takes as long for one as for several; beside a batch of
    another model it has one.

    Args:
        whole: all of the CPU, and the largest batch.
        in_flight: images that wait or are computed at a time.
        free: cores that no batch has; as few as 0.
        team: how many threads compute an image faster than fewer do.
        quiet: whether nobody else wants the cores.
    """
    if team > 1:
        wanted = whole.cores // max(1, in_flight) if quiet else 1
        cores = max(1, min(wanted, team, free))
    else:
        cores = 1 if 0 < free < whole.cores else whole.cores
    return whole if cores == whole.cores else Share(cores, images_on_part(whole, cores))


def images_on_part(whole: Share, cores: int) -> int:
    """Most images of a batch that has some of the cores of a CPU."""
    return min(whole.images, max(_ENOUGH, -(-whole.images * cores // whole.cores)))


class OnCpu:
    """Runs batches of a classifier on the cores of a CPU, or in OpenVINO.

    To be made in a thread of the device; several of these launch batches at a time. Sampling points
    are there after a pass, so nothing depends on whether they are wanted. A pass with attention is
    traced when it is first wanted.
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
        self._image_size = image_size
        self._cores = device.cores
        self._passes = _Passes(classify, device)
        self._openvino: OpenVinoClassify | None = None
        if backend == "openvino":
            self._openvino = OpenVinoClassify(
                classify, image_size, buckets, device.threads, cache, dtype=dtype
            )
        else:
            if isinstance(classify.model, DAT):
                pack(classify.model)
            self._passes.trace_ahead(buckets)

    async def settle(self) -> None:
        """Nothing is left to do."""

    def launch(
        self, batch: Sequence[ClassificationInput], wanted: Wanted, cores: int
    ) -> Callable[[], Sequence[Ranked]]:
        """Run a batch; the function that is returned has its parts, each of some images."""
        padding = pick_bucket(len(batch), self._buckets) - len(batch)
        parts = self._run(batch, wanted.attention, cores)
        self._metrics.real_rows.inc(len(batch))
        self._metrics.padding_rows.inc(padding)
        self._metrics.replays["eager"].inc()
        return lambda: parts

    def forget(self) -> None:
        """Nothing: there are no graphs."""

    def warm_up(self, batch: Sequence[ClassificationInput], _: Wanted) -> None:
        """Run a batch that counts nowhere, without attention."""
        self._run(batch, (), self._cores)

    def _run(
        self, batch: Sequence[ClassificationInput], layers: Layers, cores: int
    ) -> Sequence[Ranked]:
        if self._openvino is not None:
            return self._run_in_openvino(batch, layers)
        rows = self._stage(batch, pick_bucket(len(batch), self._buckets))
        return self._passes(rows, layers, _cells(batch, layers, len(rows)), cores)

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
            cells = _cells(asking, layers, len(asking))
            for ranked in self._passes(rows, layers, cells, self._cores):
                parts += _rows(ranked)
        by_item = dict(zip(map(id, [*plain, *asking]), parts, strict=True))
        return [by_item[id(item)] for item in batch]

    def _stage(self, batch: Sequence[ClassificationInput], size: int) -> Tensor:
        rows = np.zeros((size, *self._image_size, 3), np.uint8)
        for row, item in zip(rows, batch, strict=False):
            row[...] = item.pixels
        return torch.from_numpy(rows)


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


class _Passes:
    """A classifier as passes that were traced, one for each number of images."""

    def __init__(self, classify: Classify, device: Device) -> None:
        self._classify = classify
        self._cores = device.cores
        self._lanes = device.lanes
        self._team = team(classify.model.config)
        self._plain: dict[int, Callable[..., Ranked]] = {}
        self._explaining = OrderedDict[Layers, dict[int, Callable[..., Ranked]]]()
        self._tracing = Lock()

    def trace_ahead(self, buckets: Sequence[int]) -> None:
        """Trace what all such batches need, without attention."""
        sizes = {size for bucket in buckets for size in self._sizes(bucket)}
        if (part := min(self._team, self._cores - 1)) > 0:
            most = images_on_part(Share(self._cores, buckets[-1]), part)
            sizes |= {pick_bucket(images, buckets) for images in range(1, most + 1)}
        self._trace(self._plain, sizes, ())

    def __call__(
        self, pixels: Tensor, layers: Layers, cells: Tensor, cores: int
    ) -> Sequence[Ranked]:
        """Compute a batch on so many cores, with the attention of these layers."""
        images = len(pixels)
        is_whole = cores == self._cores
        sizes = self._sizes(images) if is_whole else {images}
        traced = self._traced(layers, sizes)
        inputs = (pixels, cells) if layers else (pixels,)

        def compute(rows: slice) -> Ranked:
            return traced[rows.stop - rows.start](*(one[rows] for one in inputs))

        if is_whole:
            return self._lanes.map(compute, images, team=self._team)
        return [self._lanes.one(compute, images, threads=cores)]

    def _sizes(self, images: int) -> set[int]:
        return self._lanes.sizes(images, team=self._team)

    def _traced(self, layers: Layers, sizes: set[int]) -> dict[int, Callable[..., Ranked]]:
        """The passes with the attention of these layers; those without were traced ahead."""
        if not layers:
            return self._plain
        with self._tracing:
            of_layers = self._explaining.setdefault(layers, {})
            self._explaining.move_to_end(layers)
            if len(self._explaining) > ATTENTION_KEPT:
                self._explaining.popitem(last=False)
            self._trace(of_layers, sizes, layers)
        return of_layers

    def _trace(
        self, traced: dict[int, Callable[..., Ranked]], sizes: Iterable[int], layers: Layers
    ) -> None:
        """Trace what is missing."""
        image_size = self._classify.model.config.image_size
        for size in set(sizes) - traced.keys():
            examples = [torch.zeros((size, *image_size, 3), dtype=torch.uint8)]
            if layers:
                examples.append(torch.zeros((size, len(layers), MOST_QUERIES), dtype=torch.int64))
            traced[size] = trace(partial(self._classify, layers=layers), *examples)
