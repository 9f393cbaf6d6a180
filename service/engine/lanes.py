"""A batch on the CPU, spread over the cores by images.

Two images on a core each are done before two images one after the other on two cores: the cores
wait for each other at the end of an image, not of every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch

from service.memory import reach_heap
from service.threads import open_pool

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Rows of a batch that are computed together, and the threads they have for it."""

    rows: slice
    threads: int


def plan(images: int, threads: int) -> list[list[Share]]:
    """Rounds of equal shares that are computed at the same time, one round after the other.

    What is left over by equal shares is a round of its own, with more threads for each image.
    """
    rounds, start = [], 0
    while start < images:
        lanes = min(images - start, threads)
        size = (images - start) // lanes
        ends = [start + size * (lane + 1) for lane in range(lanes)]
        rounds.append([Share(slice(end - size, end), threads // lanes) for end in ends])
        start = ends[-1]
    return rounds


class Lanes:
    """Threads that compute shares of a batch.

    Args:
        threads: of all of them together.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = open_pool(threads, "lane", reach_heap)

    def share_sizes(self, images: int) -> set[int]:
        """Numbers of rows that `map` gives at a time."""
        shares = chain.from_iterable(plan(images, self._threads))
        return {share.rows.stop - share.rows.start for share in shares}

    def map(self, work: Callable[[slice], T], images: int) -> list[T]:
        """Call `work` with the rows of every share, in inference mode; results in order of rows.

        A single share is computed in the calling thread.
        """

        def compute(share: Share) -> T:
            # A setting of the calling thread, like the mode.
            torch.set_num_threads(share.threads)
            with torch.inference_mode():
                return work(share.rows)

        results: list[T] = []
        for shares in plan(images, self._threads):
            if len(shares) == 1:
                results.append(compute(shares[0]))
            else:
                results += self._pool.map(compute, shares)
        return results

    def shutdown(self, *, wait: bool = True) -> None:
        """End the threads.

        Args:
            wait: for those that still compute.
        """
        self._pool.shutdown(wait)
