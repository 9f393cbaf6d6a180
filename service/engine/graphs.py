"""Buckets, and CUDA graphs captured for them.

A bucket is a batch size that the device runs. On CUDA each one has a graph; a batch is copied
into the graph's inputs, the graph is replayed, and its outputs are copied out.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
Outputs = TypeVar("Outputs")
Graph = TypeVar("Graph")

WARM_UP_RUNS = 3  # before a capture: libraries choose algorithms and allocate in the first runs

# Torch lets only one capture be under way in a process, on whichever device.
_capturing = Lock()


def default_buckets(device: torch.device, max_batch: int) -> tuple[int, ...]:
    """Every size on CPU, where padding costs as much as an image.

    On CUDA powers of two and the halves between them: over all batches of up to 64 images padding
    adds 15 % then, and 31 % with the powers alone.
    """
    if device.type == "cpu":
        return tuple(range(1, max_batch + 1))
    powers = [1 << n for n in range(max_batch.bit_length())]
    smaller = {size for power in powers for size in (power, 3 * power) if size < max_batch}
    return (*sorted(smaller), max_batch)


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


class Capture(Protocol):
    """How a graph is captured; to be called in the thread that will replay it."""

    def __call__(
        self,
        work: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        *,
        warm_up_runs: int = WARM_UP_RUNS,
    ) -> CapturedGraph[Any]:
        """Record `work(*inputs)`.

        Args:
            work: to be recorded.
            inputs: on the device.
            warm_up_runs: before that; none where the work has just run on such inputs.
        """
        ...


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory; largest first, so that others fit in.

    It captures in the stream in which the calling thread computes, whose workspaces of cuBLAS are
    those of the graphs then, or in one of its own where that is the default stream, in which
    nothing can be captured. Torch's own stream for captures is of the first device that had one:
    what another device does would not be recorded, without a word.

    Args:
        device: its graphs may only be replayed one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream(device)
        in_default = stream == torch.cuda.default_stream(device)
        self._stream = torch.cuda.Stream(device) if in_default else stream

    def __call__(
        self,
        work: Callable[..., Outputs],
        inputs: tuple[Tensor, ...],
        *,
        warm_up_runs: int = WARM_UP_RUNS,
    ) -> CapturedGraph[Outputs]:
        """Capture `work(*inputs)`.

        Raises:
            RuntimeError: the work cannot be captured, or there is no memory for it.
        """
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        # A capture that fails leaves its stream behind as the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for _ in range(warm_up_runs):
                work(*inputs)
            captured = self._record(work, inputs)
        computing.wait_stream(self._stream)
        return captured

    def _record(
        self, work: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> CapturedGraph[Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: in the global mode a CUDA call of any other thread breaks the capture.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with _capturing, recording:
                outputs = work(*inputs)
        except BaseException:
            # The allocator may go on taking the pool for one that is being recorded to.
            self._pool = torch.cuda.graph_pool_handle()
            raise
        return CapturedGraph(inputs, outputs, graph.replay)


def fused(work: Callable[..., Outputs], shapes: int) -> Callable[..., Outputs]:
    """Work that `torch.compile` compiles for each shape of its inputs; to be called one at a time.

    Args:
        work: to be compiled.
        shapes: how many there will be.
    """
    # Torch counts compilations by the code, whichever model runs it, and leaves what goes beyond
    # its limit as it is, without a word: the last and so the smallest batches.
    limits = torch.compiler.config
    limits.recompile_limit += shapes
    limits.accumulated_recompile_limit += shapes
    limits.fail_on_recompile_limit_hit = True
    return torch.compile(work, dynamic=False)


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
        """Count that a key had no graph; true once, when it is worth a capture."""
        self._misses[key] += 1
        return self._misses[key] == self._after

    def clear(self) -> None:
        """Drop all."""
        self._ahead.clear()
        self._on_demand.clear()

    def put_ahead(self, key: Key, graph: Graph) -> None:
        """Keep a graph for good."""
        self._ahead[key] = graph

    def put(self, key: Key, graph: Graph) -> None:
        """Keep a graph until others were used more recently."""
        self._on_demand[key] = graph
        if len(self._on_demand) > self._kept:
            left, _ = self._on_demand.popitem(last=False)
            # The key may come again.
            del self._misses[left]
