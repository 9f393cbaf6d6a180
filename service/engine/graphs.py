"""Buckets, and CUDA graphs captured for them.

A bucket is a batch size that the device runs. On CUDA each one has a graph; a batch is copied
into the graph's inputs, the graph is replayed, and its outputs are copied out.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
Outputs = TypeVar("Outputs")
Graph = TypeVar("Graph")

WARM_UP_RUNS = 3  # before a capture: libraries choose algorithms and allocate in the first runs


def default_buckets(device: torch.device, max_batch: int) -> tuple[int, ...]:
    """Every size on CPU, where padding costs as much as an image; powers of two on CUDA."""
    if device.type == "cpu":
        return tuple(range(1, max_batch + 1))
    powers = [1 << n for n in range(max_batch.bit_length()) if 1 << n < max_batch]
    return (*powers, max_batch)


def choose_buckets(
    device: torch.device, buckets: Sequence[int], max_batch: int, default: int
) -> tuple[int, ...]:
    """The buckets that were asked for, or those up to the largest batch; ascending.

    Args:
        device: that runs them.
        buckets: asked for; may be empty.
        max_batch: asked for; 0 means the largest bucket, or the default.
        default: largest batch when nothing was asked for.
    """
    largest = max_batch or max(buckets, default=default)
    return tuple(sorted(buckets)) or default_buckets(device, largest)


def pick_bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size` images; `buckets` ascend."""
    return buckets[bisect_left(buckets, size)]


@dataclass(frozen=True)
class CapturedGraph(Generic[Outputs]):
    """One piece of work with its static inputs and outputs.

    To run it: copy into `inputs`, `replay()`, copy `outputs` out. The outputs are valid until
    the next replay of any graph of the same capture.

    Attributes:
        inputs: on the device.
        outputs: of the work, on the device.
        replay: runs the work on what `inputs` holds.
    """

    inputs: tuple[Tensor, ...]
    outputs: Outputs
    replay: Callable[[], object]


# Records `work(*inputs)`; to be called in the thread that will replay it.
Capture = Callable[[Callable[..., Any], tuple[Tensor, ...]], CapturedGraph[Any]]


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory; largest first, so that others fit in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, work: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> CapturedGraph[Outputs]:
        """Capture `work(*inputs)`.

        Raises:
            RuntimeError: the work cannot be captured, or there is no memory for it.
        """
        side_stream = torch.cuda.Stream(self._device)
        side_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP_RUNS):
                work(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: in the global mode a CUDA call of any other thread breaks the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work(*inputs)
        return CapturedGraph(inputs, outputs, graph.replay)


class GraphCache(Generic[Key, Graph]):
    """Graphs by what they were captured for; those captured on demand leave by their last use.

    Args:
        kept: how many captured on demand stay.
        after: how often a key is missed before it is worth a capture.
    """

    def __init__(self, *, kept: int, after: int) -> None:
        self._kept = kept
        self._after = after
        self._ahead: dict[Key, Graph] = {}
        self._on_demand: OrderedDict[Key, Graph] = OrderedDict()
        self._misses: Counter[Key] = Counter()

    def __len__(self) -> int:
        return len(self._ahead) + len(self._on_demand)

    def get(self, key: Key) -> Graph | None:
        """The graph for a key, if there is one."""
        if key in self._on_demand:
            self._on_demand.move_to_end(key)
            return self._on_demand[key]
        return self._ahead.get(key)

    def missed(self, key: Key) -> bool:
        """Count that there was none; true once for each key that is worth a capture."""
        self._misses[key] += 1
        return self._misses[key] == self._after

    def put_ahead(self, key: Key, graph: Graph) -> None:
        """Keep a graph for good."""
        self._ahead[key] = graph

    def put(self, key: Key, graph: Graph) -> None:
        """Keep a graph until others were used more recently."""
        self._on_demand[key] = graph
        if len(self._on_demand) > self._kept:
            left, _ = self._on_demand.popitem(last=False)
            # It may come again.
            del self._misses[left]
