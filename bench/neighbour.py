"""Measure a server whose cores a neighbour wants as well, beside the same server in quiet.

The neighbour is one process that never waits. It has half of the core that both want, so a fair
share is all the cores but half of one. The server is one process, or has front ends and a worker.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from statistics import median

from bench.harness import Row, alternate, options, publish, ratio, table
from bench.running_server import RunningServer, running_server
from bench.weights import recipe_state
from service.machine import cores

DEMO = "dat_nano"
IN_FLIGHT = {DEMO: [1, 8, 32], "dat_tiny_224": [1, 8], "dat_pp_tiny_224": [1, 8]}


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that wants a core all the time, in a session of its own."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        time.sleep(0.5)
        yield
    finally:
        busy.kill()
        busy.wait()


def measure(server: RunningServer, seconds: float, in_flight: int, *, crowded: bool) -> float:
    """Answers a second."""
    with neighbour() if crowded else nullcontext():
        figures = server.load("http", concurrency=in_flight, seconds=seconds, warmup=1)
    return float(figures["answered_per_s"])


def rows(model: str, front_ends: int, rounds: int, seconds: float) -> list[Row]:
    """One row for each number of requests in flight."""
    checkpoint = None if model == DEMO else {"model": recipe_state(model)}
    settings = {"DAT_MODEL__NAME": model, "DAT_SERVER__FRONT_ENDS": front_ends}
    with running_server(checkpoint, **settings) as server:
        trials = {
            (in_flight, crowded): partial(measure, server, seconds, in_flight, crowded=crowded)
            for in_flight, crowded in product(IN_FLIGHT[model], (False, True))
        }
        rates = alternate(trials, rounds)
    fair = (cores() - 0.5) / cores()
    return [
        {
            "model": model,
            "front_ends": front_ends,
            "in_flight": in_flight,
            "quiet_per_s": median(rates[in_flight, False]),
            "crowded_per_s": median(rates[in_flight, True]),
            "share_of_fair": ratio(rates[in_flight, True], rates[in_flight, False])["ratio"] / fair,
        }
        for in_flight in IN_FLIGHT[model]
    ]


def tables(result: Row) -> str:
    """The table of `neighbour-cpu.json`."""
    columns = {
        "model": "{model}",
        "front ends": "{front_ends}",
        "in flight": "{in_flight}",
        "code": "{code}",
        "in quiet, answers/s": "{quiet_per_s:rate}",
        "beside a busy neighbour": "{crowded_per_s:rate}",
        "of the fair share": "**{share_of_fair:.0%}**",
    }
    # What older files do not say.
    was = {"code": "this", "front_ends": 0}
    return table(columns, (was | row for row in result["rows"]))


def main() -> None:
    """Measure all models."""
    chosen = options(
        "bench.neighbour",
        __doc__,
        {"models": IN_FLIGHT},
        models=list(IN_FLIGHT),
        front_ends=[0, cores()],
        rounds=3,
        seconds=4.0,
    )
    found = [
        row
        for name, front_ends in product(chosen.models, chosen.front_ends)
        for row in rows(name, front_ends, chosen.rounds, chosen.seconds)
    ]
    publish("neighbour-cpu", tables, chosen, rows=found)


if __name__ == "__main__":
    main()
