"""A server with a fixed number of requests in flight, beside its engine alone.

Rounds alternate: engine alone, server under load, engine alone, and so on; while one works the
other is idle. Each server round is compared with the engine rounds before and after it, at the
batch sizes that the server formed in that round.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import mean, median

import numpy as np

from bench.harness import ratio, time_calls
from bench.running_server import RunningServer
from bench.tables import LATENCY, RATIO, Row, in_short

SIZES_TIMED = 4  # of the batch sizes that the server forms, those with the most images

Call = Callable[[], object]


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
) -> Row:
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
    return {
        "protocol": protocol,
        "concurrency": concurrency,
        "images_per_s": median(figures["images_per_s"] for figures in server_rounds),
        "engine_images_per_s": median(engine_rates),
        **ratio((figures["images_per_s"] for figures in server_rounds), engine_rates),
        **{key: median(f[key] for f in server_rounds) for key in ("p50_ms", "p90_ms", "p99_ms")},
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
