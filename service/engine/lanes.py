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

# Of the time of a lane's first thread, from when on its cores are wanted by others, or by nobody.
_CROWDED, _QUIET = 0.8, 0.9
_SMOOTHING = 0.3
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0


@dataclass(frozen=True)
class Lane:
    """Rows of a batch that are computed together, and the threads they have for it."""

    rows: slice
    threads: int


def plan(images: int, threads: int, *, team: int) -> list[Lane]:
    """Cut a batch into as many lanes as there are threads, or images if these are fewer.

    Args:
        images: of the batch.
        threads: of all lanes.
        team: how many threads compute an image faster than fewer do.
    """
    lanes = min(images, threads)
    each, over = divmod(images, lanes)
    ends = accumulate([each + 1] * over + [each] * (lanes - over), initial=0)
    return [Lane(slice(begin, end), min(team, threads // lanes)) for begin, end in pairwise(ends)]


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
        """Learn from a lane: what its first thread computed, and how long it took; seconds."""
        self._computing += _SMOOTHING * (cpu_s / wall_s - self._computing)
        if self._computing < _CROWDED:
            self._computing = 1.0
            self._alone_until = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        elif self._computing > _QUIET:
            self._pause_s = _SHORTEST_PAUSE_S


class Lanes:
    """Threads that compute a batch together.

    Args:
        threads: of all lanes.
        begin: what each thread does first.

    Attributes:
        crowd: whether others want the cores too.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def __init__(self, threads: int, begin: Callable[[], None] = reach_heap) -> None:
        self.crowd = Crowd()
        self._threads = threads
        self._pool = open_pool(threads, "lane", begin)

    def sizes(self, images: int, *, team: int) -> set[int]:
        """Numbers of rows that `map` may give at a time."""
        plans = [self._plan(images, team=team, quiet=quiet) for quiet in (True, False)]
        return {lane.rows.stop - lane.rows.start for lane in chain.from_iterable(plans)}

    def map(self, work: Callable[[slice], T], images: int, *, team: int) -> list[T]:
        """Call `work` with the rows of every lane, in inference mode; results in order of rows.

        A single lane is computed in the calling thread.

        Args:
            work: on rows of the batch.
            images: of the batch.
            team: how many threads compute an image faster than fewer do, in quiet.
        """
        quiet = self.crowd.quiet

        def compute(lane: Lane) -> T:
            return self._compute(work, lane, learn=quiet and (lane.threads > 1 or team == 1))

        lanes = self._plan(images, team=team, quiet=quiet)
        return [compute(lanes[0])] if len(lanes) == 1 else list(self._pool.map(compute, lanes))

    def one(self, work: Callable[[slice], T], images: int, *, threads: int) -> T:
        """Call `work` with all rows, in inference mode and in the calling thread.

        Args:
            work: as of `map`.
            images: of the batch.
            threads: that compute it together.
        """
        return self._compute(work, Lane(slice(0, images), threads), learn=threads > 1)

    def _compute(self, work: Callable[[slice], T], lane: Lane, *, learn: bool) -> T:
        # A setting of the calling thread, like the mode.
        torch.set_num_threads(lane.threads)
        began, computed = perf_counter(), thread_time()
        with torch.inference_mode():
            result = work(lane.rows)
        if learn:
            self.crowd.computed(thread_time() - computed, perf_counter() - began)
        return result

    def _plan(self, images: int, *, team: int, quiet: bool) -> list[Lane]:
        if team > 1:
            return plan(images, self._threads, team=team if quiet else 1)
        return plan(images, self._threads if quiet else max(1, self._threads // 2), team=1)

    def shutdown(self, *, wait: bool = True) -> None:
        """End the threads.

        Args:
            wait: for those that still compute.
        """
        self._pool.shutdown(wait)
