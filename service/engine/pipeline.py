"""Batches one after another through a device, so that it never waits for a copy.

While a batch computes, the next one is copied to the device in a stream of its own, and nobody
waits for the whole device: a thread that needs results waits for the event behind them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Generic, NamedTuple
from weakref import finalize

import numpy as np
import structlog
import torch
from torch import Tensor

from service.engine import gpu
from service.engine.asked import Layers
from service.engine.device import CAPTURE_LIMIT_S, Device
from service.engine.graphs import Capture, CapturedGraph, GraphCache, Outputs, pick_bucket
from service.engine.slots import Row, Slot
from service.errors import EngineFailed, EngineUnavailable
from service.metrics.model import ModelMetrics

# A capture costs about as much as so many batches, and a graph is paid for in memory.
CAPTURE_AFTER = 2
GRAPHS_KEPT = 16

log = structlog.get_logger(__name__)


class Shape(NamedTuple):
    """What a graph is captured for.

    Attributes:
        size: `(H, W)` of its images, pixels.
        bucket: how many there are.
        layers: whose attention is computed beside the answers.
    """

    size: tuple[int, int]
    bucket: int
    layers: Layers = ()


class _Kept(NamedTuple, Generic[Outputs]):
    """A graph with what it reads beside its inputs, which must live as long."""

    captured: CapturedGraph[Outputs]
    read: object


class Pipeline(Generic[Outputs]):
    """Slots in which batches pass through the graphs of one model, or are computed without.

    A shape without a graph is computed eagerly; when it comes again, its graph is captured between
    two batches (`settle`). One thread captures and launches; results may be waited for in another
    one.

    Args:
        device: that computes.
        work: from inputs on the device, each `(B, ...)`, to outputs likewise. For batches that ask
            about attention it gets `layers` as well.
        buckets: batch sizes of the graphs, ascending; a batch is padded to the next.
        metrics: of the model.
        capture: how a graph is captured; without it nothing is, and no batch is padded.
        reads: what the work of images of a size `(H, W)` reads beside inputs and parameters.

    Attributes:
        graphs_bytes: memory of the device that the graphs took.
    """

    def __init__(
        self,
        device: Device,
        work: Callable[..., Outputs],
        buckets: Sequence[int],
        metrics: ModelMetrics,
        *,
        capture: Capture | None,
        reads: Callable[[tuple[int, int]], object] = lambda _: None,
    ) -> None:
        self.graphs_bytes = 0
        self._device = device
        self._work = work
        self._buckets = buckets
        self._metrics = metrics
        self._capture = capture
        self._reads = reads
        # The same names for CUDA and, where they do nothing, for the CPU.
        self._streams = torch.get_device_module(device.torch_device)
        self._copies = self._streams.Stream(device.torch_device)
        self._plain = GraphCache[Shape, _Kept[Outputs]](kept=GRAPHS_KEPT, after=CAPTURE_AFTER)
        # Those of attention push out none of the others.
        self._explaining = GraphCache[Shape, _Kept[Outputs]](kept=GRAPHS_KEPT, after=CAPTURE_AFTER)
        self._wanted = deque[tuple[Shape, Row]]()
        self._free = deque[Slot]()

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._plain) + len(self._explaining)

    def _graphs(self, shape: Shape) -> GraphCache[Shape, _Kept[Outputs]]:
        return self._explaining if shape.layers else self._plain

    def _work_of(self, shape: Shape) -> Callable[..., Outputs]:
        return partial(self._work, layers=shape.layers) if shape.layers else self._work

    def capture_ahead(self, blanks: Sequence[Row]) -> Iterator[None]:
        """Capture the graphs of some sizes for all buckets, and keep them for good.

        It is one graph in each step, in the thread of the device.

        Args:
            blanks: an image of each size.

        Raises:
            RuntimeError: a graph cannot be captured.
        """
        if self._capture is None:
            return
        # Largest first, so that the others fit into its memory.
        shapes = [(Shape(_size(blank), n), blank) for blank in blanks for n in self._buckets]
        for shape, blank in sorted(shapes, key=lambda one: _pixels(one[0]), reverse=True):
            self._plain.put_ahead(shape, self._captured(shape, blank))
            self._metrics.graphs.inc()
            yield

    def forget(self) -> None:
        """Drop the graphs and the slots, and count them no more."""
        self._metrics.graphs.dec(len(self))
        self._metrics.memory(self._device.name, "graphs").dec(self.graphs_bytes)
        self._plain.clear()
        self._explaining.clear()
        self._free.clear()
        self._wanted.clear()

    async def settle(self) -> None:
        """Capture a graph that batches called for; no image waits for a graph of its own.

        It is one at a time, with what other models want as well, so that the batches that wait
        meanwhile go before the next one. Without the graph its shape is computed eagerly as
        before, so a failure is logged and no more.
        """
        if not self._wanted:
            return
        async with self._device.captures:
            if not self._wanted:
                return
            shape, blank = self._wanted.popleft()

            def capture() -> None:
                # In the thread of the device, where a graph that leaves is freed as well.
                before = len(self)
                # It has just run.
                captured = self._captured(shape, blank, warm_up_runs=0)
                self._graphs(shape).put(shape, captured)
                self._metrics.graphs.inc(len(self) - before)

            try:
                await self._device.run(capture, CAPTURE_LIMIT_S)
            except (RuntimeError, EngineFailed, EngineUnavailable):
                log.exception("no graph", **shape._asdict())
                self._metrics.captures["failed"].inc()

    @torch.inference_mode()
    def _captured(self, shape: Shape, blank: Row, **how: int) -> _Kept[Outputs]:
        assert self._capture is not None
        before = gpu.reserved_bytes(self._device.torch_device)
        read = self._reads(shape.size)  # which is made now, or the work would make it
        inputs = tuple(
            torch.from_numpy(np.stack([part] * shape.bucket)).to(self._device.torch_device)
            for part in blank
        )
        graph = self._capture(self._work_of(shape), inputs, **how)
        grown = gpu.reserved_bytes(self._device.torch_device) - before
        self.graphs_bytes += grown
        self._metrics.memory(self._device.name, "graphs").inc(grown)
        self._metrics.captures["ok"].inc()
        return _Kept(graph, read)

    def launch(
        self,
        rows: Sequence[Row],
        select: Callable[[Outputs], Sequence[Tensor]],
        layers: Layers = (),
    ) -> Callable[[], list[Tensor]]:
        """Begin a batch; the function that is returned waits for its results.

        It may be called once, or never: the slot is free as soon as nobody holds the function.

        Args:
            rows: of images of one size, at most as many as the largest bucket.
            select: those of the outputs that are wanted; no others are copied.
            layers: whose attention is wanted.

        Raises:
            RuntimeError: the device failed; also of the function.
        """
        shape = self._shape(rows, layers)
        graphs = self._graphs(shape)
        graph = graphs.get(shape)
        results = self._begin(rows, shape, graph, select)
        self._metrics.real_rows.inc(len(rows))
        self._metrics.padding_rows.inc(shape.bucket - len(rows))
        self._metrics.replays["eager" if graph is None else "graph"].inc()
        if graph is None and self._capture is not None and graphs.missed(shape):
            blank = tuple(np.zeros_like(part) if not k else part for k, part in enumerate(rows[0]))
            self._wanted.append((shape, blank))
        return results

    def warm_up(self, rows: Sequence[Row], select: Callable[[Outputs], Sequence[Tensor]]) -> None:
        """Run a batch that counts nowhere; where a second one overlaps, with a second one."""
        shape = self._shape(rows)
        graph = self._plain.get(shape)
        batches = 1 if self._capture is None else self._device.depth
        under_way = [self._begin(rows, shape, graph, select) for _ in range(batches)]
        for results in under_way:
            results()

    def _shape(self, rows: Sequence[Row], layers: Layers = ()) -> Shape:
        padded = self._capture is not None
        bucket = pick_bucket(len(rows), self._buckets) if padded else len(rows)
        return Shape(_size(rows[0]), bucket, layers)

    @torch.inference_mode()
    def _begin(
        self,
        rows: Sequence[Row],
        shape: Shape,
        graph: _Kept[Outputs] | None,
        select: Callable[[Outputs], Sequence[Tensor]],
    ) -> Callable[[], list[Tensor]]:
        count = len(rows)
        slot = self._free.popleft() if self._free else Slot(self._device.torch_device)
        with ExitStack() as on_failure:
            on_failure.callback(self._free.append, slot)
            slot.await_idle()
            staged = slot.stage(rows, shape.bucket)
            with self._streams.stream(self._copies):
                arrived = slot.copy_in(staged, count)
                slot.copied.record()
            computing = self._streams.current_stream(self._device.torch_device)
            computing.wait_event(slot.copied)
            if graph is None:
                outputs = self._work_of(shape)(*arrived)
            else:
                # A graph reads one place only. On the device this copy takes no time.
                for static, given in zip(graph.captured.inputs, arrived, strict=True):
                    static.copy_(given)
                graph.captured.replay()
                outputs = graph.captured.outputs
            copied = slot.copy_out([tensor[:count] for tensor in select(outputs)])
            slot.done.record()
            on_failure.pop_all()

        def results() -> list[Tensor]:
            try:
                slot.await_done()
                # The slot is for the next batch then.
                return [host.clone() for host in copied]
            finally:
                leave()

        leave = finalize(results, self._free.append, slot)
        leave.atexit = False
        return results


def _size(row: Row) -> tuple[int, int]:
    height, width, _ = row[0].shape
    return height, width


def _pixels(shape: Shape) -> int:
    return shape.bucket * shape.size[0] * shape.size[1]
