"""Measure how to share the cores between decoding and computing.

One server for each split, all started before the first round; rounds alternate between the
splits, and while one server works the others idle. The ratio is to one decode thread and one
compute thread for each core, per round. Uploads are large, so that decoding counts.
"""

import os
from contextlib import ExitStack
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from bench.harness import in_turn, options, publish, ratio
from bench.machine import describe
from bench.running_server import RunningServer, running_server
from bench.tables import LATENCY, RATIO, Row, table
from bench.weights import recipe_state
from model import VARIANTS

FIGURES = ("images_per_s", "p50_ms", "p90_ms", "p99_ms", "engine_busy", "server_cpu_s")

Split = tuple[int, int]  # threads that decode, threads that compute


def compare(servers: dict[Split, RunningServer], rounds: int, **load: object) -> list[Row]:
    """Load every server in turn; the last is the one that the ratios refer to."""
    sides = {split: partial(server.load, "http", **load) for split, server in servers.items()}
    loaded = in_turn(sides, rounds)
    rates = {split: [figures[split]["images_per_s"] for figures in loaded] for split in servers}
    *_, reference = servers
    return [
        {
            "decode_threads": split[0],
            "compute_threads": split[1],
            **load,
            **{key: median(figures[split][key] for figures in loaded) for key in FIGURES},
            **ratio(rates[split], rates[reference]),
        }
        for split in servers
    ]


def tables(result: Row) -> str:
    """The table of one `thread_split-*.json`."""
    columns = {
        "in flight": "{concurrency}",
        "decode threads": "{decode_threads}",
        "compute threads": "{compute_threads}",
        "img/s": "{images_per_s:rate}",
        "img/s / all threads (range)": RATIO,
        "p50 / p90 / p99 ms": LATENCY,
        "engine busy": "{engine_busy:.0%}",
        "server CPUs": "{server_cpus:.2f}",
    }
    rows = [row | {"server_cpus": row["server_cpu_s"] / row["seconds"]} for row in result["rows"]]
    return table(columns, rows)


def main() -> None:
    """Measure every split, write the result file and print its table."""
    chosen = options(
        "bench.thread_split",
        __doc__,
        {"model": VARIANTS},
        model="dat_tiny_224",
        concurrency=[8, 32],
        rounds=3,
        seconds=5.0,
        warmup=1.0,
        width=1024,
        height=768,
    )
    cores = os.cpu_count() or 1
    counts = sorted({1, (cores + 1) // 2, cores})
    state: dict[str, Any] = {"model": recipe_state(chosen.model)}
    with ExitStack() as stack:
        servers = {
            (decode_threads, compute_threads): stack.enter_context(
                running_server(
                    state,
                    DAT_MODEL__NAME=chosen.model,
                    DAT_ENGINE__DEVICE="cpu",
                    DAT_ENGINE__THREADS=compute_threads,
                    DAT_LIMITS__DECODE_THREADS=decode_threads,
                )
            )
            for decode_threads, compute_threads in product(counts, counts)
        }
        load = {key: getattr(chosen, key) for key in ("seconds", "warmup", "width", "height")}
        rows = [
            row
            for concurrency in chosen.concurrency
            for row in compare(servers, chosen.rounds, concurrency=concurrency, **load)
        ]
    result = {
        "model": chosen.model,
        "machine": describe("bench.thread_split", "cpu"),
        "settings": vars(chosen),
        "rows": rows,
    }
    publish(f"thread_split-{chosen.model}-cpu", tables, result)


if __name__ == "__main__":
    main()
