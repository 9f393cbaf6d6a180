"""A server with a fixed number of requests in flight, beside its engine alone.

Rounds alternate: engine alone, server under load, engine alone, and so on; while one works the
other is idle. Each server round is compared with the engine rounds before and after it, at the
batch sizes that the server formed in that round.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np

from bench.running_server import RunningServer

SIZES_TIMED = 4  # of the batch sizes that the server forms, those with the most images

Call = Callable[[], object]


def time_calls(call: Call, seconds: float) -> list[float]:
    """Durations of consecutive calls, seconds; at least one, until `seconds` have passed."""
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while not durations or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return durations


class EngineAlone:
    """The engine of a server in this process, timed at the batch sizes that the server forms.

    Args:
        batch_of: gives for a batch size a call that runs the engine on such a batch.
        seconds: of a round.
    """

    def __init__(self, batch_of: Callable[[int], Call], seconds: float) -> None:
        self._batch_of, self._seconds = batch_of, seconds

    def time(self, sizes: list[int]) -> dict[int, float]:
        """Seconds per image at each batch size."""
        return {
            size: mean(time_calls(self._batch_of(size), self._seconds / len(sizes))) / size
            for size in sizes
        }


def seconds_per_image(images_by_size: dict[str, int], timed: dict[int, float]) -> float:
    """Engine time per image of a mix of batch sizes; sizes not timed are interpolated."""
    sizes = sorted(timed)
    weights = list(images_by_size.values())
    times = np.interp([int(size) for size in images_by_size], sizes, [timed[s] for s in sizes])
    return float(np.average(times, weights=weights))


def measure_closed_loop(
    server: RunningServer,
    engine: EngineAlone,
    protocol: str,
    concurrency: int,
    rounds: int,
    **options: object,
) -> dict[str, Any]:
    """Alternate engine rounds and server rounds; the options are those of the load generator."""
    load = partial(server.load, protocol, concurrency=concurrency, **options)
    first = load()
    by_share = sorted(first["images_by_batch_size"].items(), key=lambda item: -item[1])
    sizes = sorted(int(size) for size, _ in by_share[:SIZES_TIMED])
    engine_rounds = [engine.time(sizes)]
    server_rounds = []
    for _ in range(rounds):
        server_rounds.append(load())
        engine_rounds.append(engine.time(sizes))
    engine_rates = [
        1 / mean(seconds_per_image(figures["images_by_batch_size"], timed) for timed in around)
        for figures, *around in zip(
            server_rounds, engine_rounds[:-1], engine_rounds[1:], strict=True
        )
    ]
    ratios = [
        figures["images_per_s"] / rate
        for figures, rate in zip(server_rounds, engine_rates, strict=True)
    ]
    return {
        "protocol": protocol,
        "concurrency": concurrency,
        "images_per_s": median(figures["images_per_s"] for figures in server_rounds),
        "engine_images_per_s": median(engine_rates),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        **{key: median(f[key] for f in server_rounds) for key in ("p50_ms", "p90_ms", "p99_ms")},
        "rounds": server_rounds,
    }
