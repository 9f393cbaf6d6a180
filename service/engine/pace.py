"""How long a batch may take before its device counts as hung."""

from collections.abc import Callable
from time import perf_counter

from service.engine.worker import T

# A batch that takes so many times the slowest so far is taken for one that hangs; below the
# floor none is. A crowded machine is ten times as slow, and a GPU may have to compile a kernel.
_HANG_FACTOR = 20
HANG_FLOOR_S = {"cpu": 30.0, "cuda": 60.0}


class Pace:
    """How long batches of a model may take on a device before it counts as hung.

    Args:
        fixed_s: time that every batch may take, seconds; 0 goes by how long others took.
        floor_s: least time that a batch may take then, seconds.
    """

    def __init__(self, fixed_s: float, floor_s: float) -> None:
        self._fixed_s = fixed_s
        self._floor_s = floor_s
        self._slowest_s = 0.0  # for each pixel

    def limit_s(self, pixels: int) -> float:
        """What a batch of so many pixels may take, seconds."""
        return self._fixed_s or max(self._floor_s, _HANG_FACTOR * self._slowest_s * pixels)

    def timed(self, work: Callable[[], T], pixels: int) -> Callable[[], T]:
        """The work for a batch of so many pixels, which is measured if it succeeds."""

        def measured() -> T:
            start = perf_counter()
            result = work()
            self._slowest_s = max(self._slowest_s, (perf_counter() - start) / pixels)
            return result

        return measured
