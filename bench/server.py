"""Measure the real server under load, beside its engine alone.

The server runs as `python -m service` in its own process and the load generator in another;
`bench.closed_loop` says how their rounds alternate with those of the engine.
"""

from functools import partial
from typing import Any

from bench.closed_loop import COLUMNS, EngineAlone, measure_closed_loop, over_all_rounds
from bench.engine import open_engine
from bench.harness import options, publish
from bench.load import CLIENTS
from bench.machine import describe
from bench.rival import make_pixels
from bench.running_server import RunningServer, running_server
from bench.tables import LATENCY, Row, in_short, table
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
) -> list[Row]:
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


def tables(result: Row) -> str:
    """The tables of one `server-*.json`."""
    seconds = result["settings"]["seconds"]
    closed = table(COLUMNS, (over_all_rounds(row, seconds) for row in result["closed_loop"]))
    if not result["open_loop"]:
        return closed
    columns = {
        "protocol": "{protocol}",
        "of capacity": "{fraction:.0%}",
        "offered img/s": "{offered_per_s:.1f}",
        "answered img/s": "{images_per_s:.1f}",
        "p50 / p90 / p99 ms": LATENCY,
        "answers": "{answers}",
    }
    rows = [row | {"answers": in_short(row["statuses"])} for row in result["open_loop"]]
    return f"{closed}\n\n{table(columns, rows)}"


def main() -> None:
    """Measure one model, write the result file and print its tables."""
    chosen = options(
        "bench.server",
        __doc__,
        {"model": VARIANTS, "protocols": CLIENTS},
        model="dat_tiny_224",
        device="cpu",
        threads=None,
        max_batch=8,
        protocols=list(CLIENTS),
        concurrency=[1, 8, 32],
        fractions=[0.5, 0.8, 1.2],
        rounds=5,
        seconds=12.0,
        warmup=2.0,
        engine_seconds=4.0,
        image_size=256,
        quality=90,
    )
    name = chosen.model
    process.compute_alone()
    run = open_engine(name, chosen.device, chosen.threads, dtype="auto", max_batch=chosen.max_batch)
    engine = EngineAlone(lambda size: partial(run, make_pixels(name, size)), chosen.engine_seconds)
    window: dict[str, Any] = {
        "seconds": chosen.seconds,
        "warmup": chosen.warmup,
        "height": chosen.image_size,
        "width": chosen.image_size,
        "quality": chosen.quality,
    }
    closed: list[Row] = []
    opened: list[Row] = []
    with running_server(
        None if name in BUNDLED else {"model": recipe_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE=chosen.device,
        DAT_ENGINE__THREADS=chosen.threads,
        DAT_BATCHING__MAX_BATCH=chosen.max_batch,
    ) as server:
        for protocol in chosen.protocols:
            rows = [
                measure_closed_loop(server, engine, protocol, concurrency, chosen.rounds, **window)
                for concurrency in chosen.concurrency
            ]
            closed += rows
            capacity = max(row["images_per_s"] for row in rows)
            opened += measure_open_loop(server, protocol, capacity, chosen.fractions, **window)
    result = {
        "model": name,
        "device": chosen.device,
        "machine": describe("bench.server", chosen.device, chosen.threads),
        "settings": vars(chosen),
        "closed_loop": closed,
        "open_loop": opened,
    }
    publish(f"server-{name}-{chosen.device}", tables, result)


if __name__ == "__main__":
    main()
