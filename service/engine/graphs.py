"""Buckets, and CUDA graphs captured for them.

A bucket is a batch size that the device runs. On CUDA each one has a graph, captured before the
replica is ready; a batch is copied into the graph's input, replayed, and copied out.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.dat import Explained

Forward = Callable[[Tensor], Explained]

WARM_UP_RUNS = 3  # before a capture: libraries choose algorithms and allocate in the first runs


def default_buckets(device: torch.device, max_batch: int) -> tuple[int, ...]:
    """Every size on CPU, where padding costs as much as an image; powers of two on CUDA."""
    if device.type == "cpu":
        return tuple(range(1, max_batch + 1))
    powers = [1 << n for n in range(max_batch.bit_length()) if 1 << n < max_batch]
    return (*powers, max_batch)


def pick_bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size` images; `buckets` ascend."""
    return buckets[bisect_left(buckets, size)]


@dataclass(frozen=True)
class CapturedGraph:
    """One forward pass of one bucket, with its static input and output.

    To run it: copy pixels into `pixels`, `replay()`, copy `outputs` out. The outputs are valid
    until the next replay of any graph of the same pool.

    Attributes:
        bucket: rows.
        graph: the captured work.
        pixels: `(bucket, H, W, 3)` uint8 on the device.
        outputs: of `forward`, on the device.
    """

    bucket: int
    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    outputs: Explained

    def replay(self) -> Explained:
        """Run the graph on what `pixels` holds."""
        self.graph.replay()
        return self.outputs


def capture(
    forward: Forward, buckets: Sequence[int], image_size: tuple[int, int], device: torch.device
) -> dict[int, CapturedGraph]:
    """Capture one graph for each bucket; call it in the thread that will replay them."""
    graphs: dict[int, CapturedGraph] = {}
    pool = torch.cuda.graph_pool_handle()
    # Largest first: the smaller graphs then fit into the memory of the pool.
    for bucket in sorted(buckets, reverse=True):
        pixels = torch.zeros((bucket, *image_size, 3), dtype=torch.uint8, device=device)
        side_stream = torch.cuda.Stream(device)
        side_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP_RUNS):
                forward(pixels)
        torch.cuda.current_stream(device).wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: in the global mode a CUDA call of any other thread breaks the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = forward(pixels)
        graphs[bucket] = CapturedGraph(bucket, graph, pixels, outputs)
    return graphs
