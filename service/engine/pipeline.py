"""Batches one after another through captured graphs, so that the device never waits for a copy.

While a graph computes, the next batch is copied to the device in a stream of its own, and nobody
waits for the whole device: a thread that needs results waits for the event behind them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engine.classify import Ranked
from service.engine.graphs import Capture, CapturedGraph, pick_bucket


@dataclass(frozen=True)
class _Slot:
    """The buffers of one batch on its way, for the largest bucket, and where it is.

    Attributes:
        staged: its pixels on the host, in memory that the device copies from by itself.
        arrived: its pixels on the device.
        results: on the host, likewise.
        copied: when `arrived` is whole.
        done: when `results` are.
    """

    staged: Tensor
    arrived: Tensor
    results: Ranked
    copied: Any
    done: Any


class Pipeline:
    """Graphs of a classifier, and the slots in which batches pass through them.

    One thread captures and launches; results may be waited for in another one.

    Args:
        work: from pixels `(B, H, W, 3)` on the device to `Ranked`.
        image_size: `(H, W)`, pixels.
        buckets: batch sizes of the graphs, ascending; a batch is padded to the next.
        slots: most batches that are launched and not yet waited for.
        capture: how a graph is captured.

    Raises:
        RuntimeError: a graph cannot be captured.
    """

    def __init__(
        self,
        device: torch.device,
        work: Callable[[Tensor], Ranked],
        image_size: tuple[int, int],
        buckets: Sequence[int],
        *,
        slots: int,
        capture: Capture,
    ) -> None:
        self._buckets = buckets
        # The same names for CUDA and, where they do nothing, for the CPU.
        self._streams = torch.get_device_module(device)
        self._copies = self._streams.Stream()
        self._graphs: dict[int, CapturedGraph[Ranked]] = {}
        # Largest first, so that the others fit into its memory.
        for bucket in reversed(buckets):
            pixels = torch.zeros((bucket, *image_size, 3), dtype=torch.uint8, device=device)
            self._graphs[bucket] = capture(work, (pixels,))
        largest = self._graphs[buckets[-1]]
        self._free = deque(self._slot(largest) for _ in range(slots))

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def _slot(self, graph: CapturedGraph[Ranked]) -> _Slot:
        (pixels,) = graph.inputs
        pinned = pixels.device.type == "cuda"

        def on_host(tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor, device="cpu", pin_memory=pinned)

        scores, classes, locations = graph.outputs
        return _Slot(
            on_host(pixels),
            # Not filled: the stream of the copies would not wait for that.
            torch.empty_like(pixels),
            Ranked(on_host(scores), on_host(classes), tuple(map(on_host, locations))),
            self._streams.Event(),
            self._streams.Event(),
        )

    def launch(self, images: Sequence[NDArray[np.uint8]], *, explain: bool) -> Callable[[], Ranked]:
        """Begin a batch of images `(H, W, 3)`; the function that is returned waits for its results.

        Args:
            images: at most as many as the largest bucket.
            explain: whether the sampling locations are wanted; none are copied otherwise.

        Raises:
            RuntimeError: the device failed; also of the function.
        """
        count = len(images)
        graph = self._graphs[pick_bucket(count, self._buckets)]
        slot = self._free.popleft()
        with ExitStack() as on_failure:
            on_failure.callback(self._free.append, slot)
            for row, image in zip(slot.staged.numpy(), images, strict=False):
                row[...] = image
            with self._streams.stream(self._copies):
                slot.arrived[:count].copy_(slot.staged[:count], non_blocking=True)
                slot.copied.record()
            computing = self._streams.current_stream()
            computing.wait_event(slot.copied)
            # The graph reads one place only. On the device this copy takes no time; the rows of
            # its padding keep what an earlier batch left.
            graph.inputs[0][:count].copy_(slot.arrived[:count])
            graph.replay()
            wanted = _tensors(slot.results, explain=explain)
            for host, static in zip(wanted, _tensors(graph.outputs, explain=explain), strict=True):
                host[:count].copy_(static[:count], non_blocking=True)
            slot.done.record()
            on_failure.pop_all()

        def results() -> Ranked:
            try:
                slot.done.synchronize()
                # The slot is for the next batch then.
                scores, classes, *locations = (host[:count].clone() for host in wanted)
            finally:
                self._free.append(slot)
            return Ranked(scores, classes, tuple(locations))

        return results


def _tensors(ranked: Ranked, *, explain: bool) -> list[Tensor]:
    locations = ranked.sampling_locations if explain else ()
    return [ranked.scores, ranked.classes, *locations]
