"""A batch on the CPU, spread over the cores by images.

Two images on a core each are done before two images one after the other on two cores: the cores
wait for each other at the end of an image, not of every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import TypeVar

import torch

from service.memory import reach_heap
from service.threads import open_pool

T = TypeVar("T")


_FEW = 2  # images of a lane that are not worth dealing out one by one


@dataclass(frozen=True)
class Share:
    """Rows of a batch that are computed together, and the threads they have for it."""

    rows: slice
    threads: int


def plan(images: int, threads: int, *, team: bool) -> list[list[Share]]:
    """Rounds of shares that lanes take one after the other, each when it is done with the last.

    The last shares of a round are single images, so that a lane whose core has another process on
    it as well takes fewer of them.

    Args:
        images: of the batch.
        threads: of all lanes.
        team: whether several threads compute an image faster than one. Those left over when every
            lane has as many are then a round of their own, with more threads for each.
    """
    rounds, start = [], 0
    while start < images:
        lanes = min(images - start, threads)
        each = (images - start) // lanes
        count = lanes * each if team else images - start
        large = each - 1 if each > _FEW else each
        sizes = [large] * lanes + [1] * (count - lanes * large)
        ends = accumulate(sizes, initial=start)
        rounds.append(
            [
                Share(slice(begin, end), threads // lanes if team else 1)
                for begin, end in pairwise(ends)
            ]
        )
        start += count
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

    def share_sizes(self, images: int, *, team: bool) -> set[int]:
        """Numbers of rows that `map` gives at a time."""
        shares = chain.from_iterable(plan(images, self._threads, team=team))
        return {share.rows.stop - share.rows.start for share in shares}

    def map(self, work: Callable[[slice], T], images: int, *, team: bool) -> list[T]:
        """Call `work` with the rows of every share, in inference mode; results in order of rows.

        A single share is computed in the calling thread.
        """

        def compute(share: Share) -> T:
            # A setting of the calling thread, like the mode.
            torch.set_num_threads(share.threads)
            with torch.inference_mode():
                return work(share.rows)

        results: list[T] = []
        for shares in plan(images, self._threads, team=team):
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
