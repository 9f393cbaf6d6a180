"""Measure the real server under load, beside its engine alone.

The server runs as `python -m service` in its own process and the load generator in another;
`bench.closed_loop` says how their rounds alternate with those of the engine.
"""

import argparse
import json
from functools import partial
from typing import Any

import torch

from bench.closed_loop import EngineAlone, measure_closed_loop
from bench.engine import open_engine
from bench.load import CLIENTS
from bench.machine import RESULTS, describe
from bench.report import server_tables
from bench.rival import make_pixels
from bench.running_server import RunningServer, running_server
from bench.weights import recipe_state
from model import VARIANTS
from service import process
from service.models.load import BUNDLED


def measure_open_loop(
    server: RunningServer,
    protocol: str,
    capacity: float,
    fractions: list[float],
    **options: object,
) -> list[dict[str, Any]]:
    """One run for each fraction of the measured capacity, images per second."""
    return [
        {
            "protocol": protocol,
            "fraction": fraction,
            "offered_per_s": fraction * capacity,
            **server.load(protocol, rate=fraction * capacity, **options),
        }
        for fraction in fractions
    ]


def main() -> None:
    """Measure one model, write the result file and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.server", description=__doc__)
    parser.add_argument("--model", choices=VARIANTS, default="dat_tiny_224")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--protocols", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.5, 0.8, 1.2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a server round")
    parser.add_argument("--warmup", type=float, default=2.0, help="before each server round")
    parser.add_argument("--engine-seconds", type=float, default=4.0, help="of an engine round")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of each side")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    arguments = parser.parse_args()
    name = arguments.model
    process.compute_alone()
    run = open_engine(
        name, arguments.device, arguments.threads, dtype="auto", max_batch=arguments.max_batch
    )
    engine = EngineAlone(
        lambda size: partial(run, make_pixels(name, size)), arguments.engine_seconds
    )
    window: dict[str, Any] = {
        "seconds": arguments.seconds,
        "warmup": arguments.warmup,
        "height": arguments.image_size,
        "width": arguments.image_size,
        "quality": arguments.quality,
    }
    closed: list[dict[str, Any]] = []
    opened: list[dict[str, Any]] = []
    with running_server(
        None if name in BUNDLED else {"model": recipe_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE=arguments.device,
        DAT_ENGINE__THREADS=arguments.threads,
        DAT_BATCHING__MAX_BATCH=arguments.max_batch,
    ) as server:
        for protocol in arguments.protocols:
            rows = [
                measure_closed_loop(
                    server, engine, protocol, concurrency, arguments.rounds, **window
                )
                for concurrency in arguments.concurrency
            ]
            closed += rows
            capacity = max(row["images_per_s"] for row in rows)
            opened += measure_open_loop(server, protocol, capacity, arguments.fractions, **window)
    result = {
        "model": name,
        "device": arguments.device,
        "machine": describe("bench.server", arguments.device, arguments.threads),
        "settings": vars(arguments),
        "closed_loop": closed,
        "open_loop": opened,
    }
    path = RESULTS / f"server-{name}-{arguments.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}, {arguments.device}\n\n{server_tables(result)}")


if __name__ == "__main__":
    main()
