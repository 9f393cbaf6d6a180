"""What stands for a CUDA graph where there is no GPU."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from service.engine.graphs import CapturedGraph, pick_bucket
from service.engine.pipeline import CAPTURE_AFTER


def tensors(value: Any) -> list[Tensor]:
    """The leaves of nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, tuple | list) else ()
    return [leaf for one in parts for leaf in tensors(one)]


def replays(counts: Sequence[int], buckets: Sequence[int]) -> int:
    """How many of batches of one size run in a graph, none of which was there before them.

    Args:
        counts: images of each batch, after which what it called for is captured.
        buckets: of the graphs.
    """
    padded = [pick_bucket(count, buckets) for count in counts]
    return sum(padded[:index].count(bucket) >= CAPTURE_AFTER for index, bucket in enumerate(padded))


def recorded(
    work: Callable[..., Any], inputs: tuple[Tensor, ...], *, warm_up_runs: int = 0
) -> CapturedGraph[Any]:
    outputs = work(*inputs)

    def replay() -> None:
        for static, fresh in zip(tensors(outputs), tensors(work(*inputs)), strict=True):
            # On the CPU a detector's outputs are only as large as what it found.
            static.resize_(fresh.shape).copy_(fresh)

    return CapturedGraph(inputs, outputs, replay)
