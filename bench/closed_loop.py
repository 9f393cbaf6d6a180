"""A server with a fixed number of requests in flight, beside its engine alone.

Rounds alternate: engine alone, server under load, engine alone, and so on; while one works the
other is idle. Each server round is compared with the engine rounds before and after it, at the
batch sizes that the server formed in that round.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np

from bench.harness import LATENCY, RATIO, Row, in_short, ratio, time_calls
from bench.running_server import RunningServer

SIZES_TIMED = 4  # of the batch sizes that the server forms, those with the most images


def seconds_per_image(images_by_size: dict[str, int], timed: dict[int, float]) -> float:
    """Engine time per image of a mix of batch sizes; sizes not timed are interpolated."""
    sizes = sorted(timed)
    weights = list(images_by_size.values())
    times = np.interp([int(size) for size in images_by_size], sizes, [timed[s] for s in sizes])
    return float(np.average(times, weights=weights))


def measure_closed_loop(
    server: RunningServer,
    batch_of: Callable[[int], Callable[[], object]],
    protocol: str,
    rounds: int,
    engine_seconds: float,
    **options: Any,
) -> Row:
    """Alternate engine rounds and server rounds.

    Args:
        server: runs already.
        batch_of: gives for a batch size a call that runs the engine on such a batch.
        protocol: of the requests.
        rounds: of the server; the engine has one more.
        engine_seconds: of an engine round.
        **options: of the load generator.
    """
    load = partial(server.load, protocol, **options)
    by_share = Counter(load()["images_by_batch_size"]).most_common(SIZES_TIMED)
    sizes = sorted(int(size) for size, _ in by_share)

    def time_engine() -> dict[int, float]:
        share = engine_seconds / len(sizes)
        return {size: mean(time_calls(batch_of(size), share)) / size for size in sizes}

    engine_rounds, server_rounds = [time_engine()], []
    for _ in range(rounds):
        server_rounds.append(load())
        engine_rounds.append(time_engine())
    engine_rates = [
        1 / mean(seconds_per_image(figures["images_by_batch_size"], timed) for timed in around)
        for figures, *around in zip(
            server_rounds, engine_rounds[:-1], engine_rounds[1:], strict=True
        )
    ]
    medians = ("images_per_s", "p50_ms", "p90_ms", "p99_ms")
    return {
        "protocol": protocol,
        "concurrency": options["concurrency"],
        "engine_images_per_s": median(engine_rates),
        **ratio((figures["images_per_s"] for figures in server_rounds), engine_rates),
        **{key: median(figures[key] for figures in server_rounds) for key in medians},
        "rounds": server_rounds,
    }


COLUMNS = {
    "protocol": "{protocol}",
    "in flight": "{concurrency}",
    "server img/s": "{images_per_s:rate}",
    "engine img/s": "{engine_images_per_s:rate}",
    "server / engine (range)": RATIO,
    "engine busy": "{engine_busy:.0%}",
    "mean batch": "{mean_batch:.1f}",
    "p50 / p90 / p99 ms": LATENCY,
    "answers": "{answers}",
    "server CPUs": "{server_cpus:.2f}",
    "client CPUs": "{client_cpus:.3f}",
}


def over_all_rounds(row: Row, seconds: float) -> Row:
    """What `COLUMNS` shows of one load, whose rounds took so many seconds each."""
    rounds = row["rounds"]
    images, statuses = Counter[str](), Counter[str]()
    for figures in rounds:
        images.update(figures["images_by_batch_size"])
        statuses.update(figures["statuses"])
    batches = sum(count / int(size) for size, count in images.items())
    return row | {
        "engine_busy": mean(figures["engine_busy"] for figures in rounds),
        "mean_batch": images.total() / batches,
        "answers": in_short(statuses),
        "server_cpus": mean(figures["server_cpu_s"] for figures in rounds) / seconds,
        "client_cpus": mean(figures["client_cpu_s"] for figures in rounds) / seconds,
    }
