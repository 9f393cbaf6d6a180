"""Ways to run a classifier, each in a process of its own.

What the C library does with freed memory is one setting of a whole process, and it decides: the
same baseline with the same weights is up to twice as fast in a process that keeps its memory
(`bench/results/README.md`). While one process works the others wait for their turn.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.harness import time_calls
from bench.memory import own_process
from model import VARIANTS
from service import process
from tests import recipe

Pixels = NDArray[np.uint8]
# From `(B, H, W, 3)` and options of its own to probabilities `(B, num_classes)`.
Run = Callable[..., NDArray[np.float32]]


def make_pixels(name: str, batch: int) -> Pixels:
    """A batch of test pictures at the model's input size, `(B, H, W, 3)`."""
    height, width = VARIANTS[name].image_size
    return np.stack([recipe.image(0, index, height, width) for index in range(batch)])


class Timed(NamedTuple):
    """Probabilities of a batch `(B, num_classes)`, and how long each call took, seconds."""

    scores: NDArray[np.float32]
    durations: list[float]


class Rival:
    """A classifier in a process of its own.

    Args:
        open_run: loads it, there.
        name: of the model.
        environment: variables of that process alone.
    """

    def __init__(
        self,
        open_run: Callable[[], Run],
        name: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._name = name
        self._process = own_process(environment)
        self._process.submit(_open, open_run).result()

    def time(self, batch: int, seconds: float, **options: object) -> Timed:
        """Compute consecutive batches, until `seconds` have passed, with options of its run."""
        return self._process.submit(_time, self._name, batch, seconds, options).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


_opened: list[Run] = []  # in the process of a rival, the only one


def _open(open_run: Callable[[], Run]) -> None:
    process.compute_alone()
    _opened.append(open_run())


def _time(name: str, batch: int, seconds: float, options: Mapping[str, object]) -> Timed:
    call = partial(_opened[0], make_pixels(name, batch), **options)
    return Timed(call(), time_calls(call, seconds))
