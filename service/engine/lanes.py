"""A batch on the CPU, spread over the cores by images.

Two images on a core each are done before two images one after the other on two cores: the cores
wait for each other at the end of an image, not of every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from math import inf
from time import monotonic, perf_counter, thread_time

import torch

from service.engine.worker import T
from service.memory import reach_heap
from service.threads import open_pool

# Of the time of a share's first thread, from when on its cores are wanted by others, or by nobody.
_CROWDED, _QUIET = 0.8, 0.9
_SMOOTHING = 0.3
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_FEW = 2  # images of a lane that are not worth dealing out one by one


@dataclass(frozen=True)
class Share:
    """Rows of a batch that are computed together, and the threads they have for it."""

    rows: slice
    threads: int


def plan(images: int, threads: int, *, team: int, dealt: bool) -> list[list[Share]]:
    """Rounds of shares that lanes take one after the other, each when it is done with the last.

    Args:
        images: of the batch.
        threads: of all lanes.
        team: how many threads compute an image faster than fewer do. If that is several, the images
            left over when every lane has as many are a round of their own, with more threads each.
        dealt: whether half of a round is single images, so that a lane whose core has another
            process on it as well takes fewer of them. That is worth while for images that take
            long. A pass of a small model takes as long for one image as for two: its lanes have
            one share each.
    """
    rounds, start = [], 0
    while start < images:
        lanes = min(images - start, threads)
        each = (images - start) // lanes
        count = lanes * each if team > 1 else images - start
        over = count - lanes * each
        if dealt:
            large = each // 2 if each > _FEW else each
            sizes = [large] * lanes + [1] * (count - lanes * large)
        else:
            sizes = [each + 1] * over + [each] * (lanes - over)
        ends = accumulate(sizes, initial=start)
        rounds.append(
            [Share(slice(begin, end), min(team, threads // lanes)) for begin, end in pairwise(ends)]
        )
        start += count
    return rounds


class Crowd:
    """Whether others want the cores too, so that many threads for a batch do not pay.

    The threads of a team wait for each other after every operation. Where one of them has to share
    its core they all sleep, and several compute an image no faster than one does. The lanes of a
    small model wait for each other at the end of a batch, and what a pass takes beside its images
    they all take. That is told by how little of its time a thread computes; a while later it is
    tried again.

    Args:
        clock: seconds; any start.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._computing = 1.0  # share of the time
        self._alone_until = -inf
        self._pause_s = _SHORTEST_PAUSE_S

    @property
    def quiet(self) -> bool:
        """Whether the cores are ours, as far as is known."""
        return self._clock() >= self._alone_until

    def computed(self, cpu_s: float, wall_s: float) -> None:
        """Learn from a share: what its first thread computed, and how long it took; seconds."""
        self._computing += _SMOOTHING * (cpu_s / wall_s - self._computing)
        if self._computing < _CROWDED:
            self._computing = 1.0
            self._alone_until = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif self._computing > _QUIET:
            self._pause_s = _SHORTEST_PAUSE_S


class Lanes:
    """Threads that compute shares of a batch.

    Args:
        threads: of all of them together.
        begin: what each thread does first.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def __init__(self, threads: int, begin: Callable[[], None] = reach_heap) -> None:
        self._threads = threads
        self._crowd = Crowd()
        self._pool = open_pool(threads, "lane", begin)

    def share_sizes(self, images: int, *, team: int) -> set[int]:
        """Numbers of rows that `map` may give at a time."""
        plans = [self._plan(images, team=team, quiet=quiet) for quiet in (True, False)]
        shares = chain.from_iterable(chain.from_iterable(plans))
        return {share.rows.stop - share.rows.start for share in shares}

    def map(self, work: Callable[[slice], T], images: int, *, team: int) -> list[T]:
        """Call `work` with the rows of every share, in inference mode; results in order of rows.

        A single share is computed in the calling thread.

        Args:
            work: on rows of the batch.
            images: of the batch.
            team: how many threads compute an image faster than fewer do, in quiet.
        """
        quiet = self._crowd.quiet

        def compute(share: Share) -> T:
            # A setting of the calling thread, like the mode.
            torch.set_num_threads(share.threads)
            began, computed = perf_counter(), thread_time()
            with torch.inference_mode():
                result = work(share.rows)
            if quiet and (share.threads > 1 or team == 1):
                self._crowd.computed(thread_time() - computed, perf_counter() - began)
            return result

        results: list[T] = []
        for shares in self._plan(images, team=team, quiet=quiet):
            if len(shares) == 1:
                results.append(compute(shares[0]))
            else:
                results += self._pool.map(compute, shares)
        return results

    def _plan(self, images: int, *, team: int, quiet: bool) -> list[list[Share]]:
        if team > 1:
            return plan(images, self._threads, team=team if quiet else 1, dealt=True)
        lanes = self._threads if quiet else max(1, self._threads // 2)
        return plan(images, lanes, team=1, dealt=False)

    def shutdown(self, *, wait: bool = True) -> None:
        """End the threads.

        Args:
            wait: for those that still compute.
        """
        self._pool.shutdown(wait)
