"""Measure how to share the cores between decoding and computing.

One server for each split, all started before the first round; rounds alternate between the
splits, and while one server works the others idle. The ratio is to one decode thread and one
compute thread for each core, per round. Uploads are large, so that decoding counts.
"""

import argparse
import json
import os
from contextlib import ExitStack
from itertools import product
from statistics import median
from typing import Any

from bench.baseline import CONFIGS
from bench.machine import RESULTS, describe
from bench.report import thread_split_table
from bench.running_server import RunningServer, running_server
from bench.weights import recipe_state

FIGURES = ("images_per_s", "p50_ms", "p90_ms", "p99_ms", "engine_busy", "server_cpu_s")


def compare(
    servers: dict[tuple[int, int], RunningServer], rounds: int, **options: object
) -> list[dict[str, Any]]:
    """Load every server in turn; the last is the one that the ratios refer to."""
    loaded = [
        {split: server.load("http", **options) for split, server in servers.items()}
        for _ in range(rounds)
    ]
    *_, reference = servers
    rows = []
    for decode_threads, compute_threads in servers:
        split = decode_threads, compute_threads
        ratios = [
            figures[split]["images_per_s"] / figures[reference]["images_per_s"]
            for figures in loaded
        ]
        rows.append(
            {
                "decode_threads": decode_threads,
                "compute_threads": compute_threads,
                **options,
                **{key: median(figures[split][key] for figures in loaded) for key in FIGURES},
                "ratio": median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
    return rows


def main() -> None:
    """Measure every split, write the result file and print its table."""
    cores = os.cpu_count() or 1
    counts = sorted({1, (cores + 1) // 2, cores})
    parser = argparse.ArgumentParser(prog="python -m bench.thread_split", description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="dat_tiny_224")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
    parser.add_argument("--warmup", type=float, default=1.0, help="before each round")
    parser.add_argument("--width", type=int, default=1024, help="of the uploads, pixels")
    parser.add_argument("--height", type=int, default=768)
    arguments = parser.parse_args()
    state = {"model": recipe_state(arguments.model)}
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        servers = {
            (decode_threads, compute_threads): stack.enter_context(
                running_server(
                    state,
                    DAT_MODEL__NAME=arguments.model,
                    DAT_ENGINE__DEVICE="cpu",
                    DAT_ENGINE__THREADS=compute_threads,
                    DAT_LIMITS__DECODE_THREADS=decode_threads,
                )
            )
            for decode_threads, compute_threads in product(counts, counts)
        }
        for concurrency in arguments.concurrency:
            rows += compare(
                servers,
                arguments.rounds,
                concurrency=concurrency,
                seconds=arguments.seconds,
                warmup=arguments.warmup,
                width=arguments.width,
                height=arguments.height,
            )
    result = {
        "model": arguments.model,
        "machine": describe("bench.thread_split", "cpu"),
        "settings": vars(arguments),
        "rows": rows,
    }
    path = RESULTS / f"thread_split-{arguments.model}-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(thread_split_table(result))


if __name__ == "__main__":
    main()
