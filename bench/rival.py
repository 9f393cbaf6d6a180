"""Ways to run a classifier, each in a process of its own, timed in alternating rounds.

In one process the idle threads of one slow the other down, and its memory allocator is the same
for both. While one works the other waits for its turn.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import perf_counter
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from bench.closed_loop import time_calls
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

    Attributes:
        load_s: how long loading took, seconds.
    """

    def __init__(
        self,
        open_run: Callable[[], Run],
        name: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        spawning = get_context("spawn")
        self._pipe, there = spawning.Pipe()
        self._process = spawning.Process(target=_work, args=(there, open_run, name))
        with mock.patch.dict(os.environ, environment):
            self._process.start()
        self.load_s: float = self._pipe.recv()

    def time(self, batch: int, seconds: float, **options: object) -> Timed:
        """Compute consecutive batches, until `seconds` have passed, with options of its run."""
        self._pipe.send((batch, seconds, options))
        timed: Timed = self._pipe.recv()
        return timed

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def _work(pipe: Connection, open_run: Callable[[], Run], name: str) -> None:
    process.compute_alone()
    start = perf_counter()
    run = open_run()
    pipe.send(perf_counter() - start)
    while order := pipe.recv():
        batch, seconds, options = order
        call = partial(run, make_pixels(name, batch), **options)
        pipe.send(Timed(call(), time_calls(call, seconds)))
