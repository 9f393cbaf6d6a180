"""Measure the real server under load, beside its engine alone.

The server runs as `python -m service` in its own process and the load generator in another;
`bench.closed_loop` says how their rounds alternate with those of the engine.
"""

from functools import partial

from bench.closed_loop import COLUMNS, measure_closed_loop, over_all_rounds
from bench.engine import open_engine
from bench.harness import Row, options, publish, table
from bench.load import CLIENTS
from bench.rival import make_pixels
from bench.running_server import running_server
from bench.weights import recipe_state
from model import VARIANTS
from service import process
from service.models.load import BUNDLED


def tables(result: Row) -> str:
    """The table of one `server-*.json`."""
    seconds = result["settings"]["seconds"]
    return table(COLUMNS, (over_all_rounds(row, seconds) for row in result["closed_loop"]))


def main() -> None:
    """Measure one model, write the result file and print its table."""
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
        rounds=5,
        seconds=12.0,
        warmup=2.0,
        engine_seconds=4.0,
    )
    name = chosen.model
    process.compute_alone()
    run = open_engine(name, chosen.device, chosen.threads, dtype="auto", max_batch=chosen.max_batch)
    with running_server(
        None if name in BUNDLED else {"model": recipe_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE=chosen.device,
        DAT_ENGINE__THREADS=chosen.threads,
        DAT_BATCHING__MAX_BATCH=chosen.max_batch,
    ) as server:
        rows = [
            measure_closed_loop(
                server,
                lambda size: partial(run, make_pixels(name, size)),
                protocol,
                chosen.rounds,
                chosen.engine_seconds,
                concurrency=concurrency,
                seconds=chosen.seconds,
                warmup=chosen.warmup,
            )
            for protocol in chosen.protocols
            for concurrency in chosen.concurrency
        ]
    publish(f"server-{name}-{chosen.device}", tables, chosen, closed_loop=rows)


if __name__ == "__main__":
    main()
