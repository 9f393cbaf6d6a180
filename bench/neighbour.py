"""Measure a server whose cores a neighbour wants as well, beside the same server in quiet.

The neighbour is one process that never waits. It has half of the core that both want, so a fair
share is all the cores but half of one. The code of another commit can be measured in the same
rounds: each side is a server of its own, all are started before the first round, and while one
works the others idle.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

from bench.harness import in_turn, options, publish, ratio
from bench.machine import describe
from bench.running_server import RunningServer, running_server
from bench.tables import RATIO, Row, table
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


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A folder with the code of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "code"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(source), commit], check=True
        )
        try:
            yield source
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(source)], check=True)


def measure(server: RunningServer, in_flight: int, seconds: float, *, crowded: bool) -> float:
    """Answers a second."""
    with neighbour() if crowded else nullcontext():
        figures = server.load("http", concurrency=in_flight, seconds=seconds, warmup=1)
    return float(figures["answered_per_s"])


def rows(model: str, sides: dict[str, Path | None], rounds: int, seconds: float) -> list[Row]:
    """One row for each number of requests in flight and each side."""
    checkpoint = None if model == DEMO else {"model": recipe_state(model)}
    with ExitStack() as stack:
        servers = {
            side: stack.enter_context(running_server(checkpoint, source, DAT_MODEL__NAME=model))
            for side, source in sides.items()
        }
        trials = {
            (side, in_flight, crowded): partial(
                measure, server, in_flight, seconds, crowded=crowded
            )
            for in_flight in IN_FLIGHT[model]
            for crowded in (False, True)
            for side, server in servers.items()
        }
        timed = in_turn(trials, rounds)
    rates = {trial: [one[trial] for one in timed] for trial in trials}
    first = next(iter(sides))
    fair = (cores() - 0.5) / cores()
    found = []
    for in_flight in IN_FLIGHT[model]:
        for side in sides:
            in_quiet, beside = rates[side, in_flight, False], rates[side, in_flight, True]
            found.append(
                {
                    "model": model,
                    "in_flight": in_flight,
                    "code": side,
                    "quiet_per_s": median(in_quiet),
                    "crowded_per_s": median(beside),
                    "share_of_fair": ratio(beside, in_quiet)["ratio"] / fair,
                    **ratio(in_quiet, rates[first, in_flight, False]),
                }
            )
    return found


def tables(result: Row) -> str:
    """The table of `neighbour-cpu.json`."""
    columns = {
        "model": "{model}",
        "in flight": "{in_flight}",
        "code": "{code}",
        "in quiet, answers/s": "{quiet_per_s:rate}",
        "beside a busy neighbour": "{crowded_per_s:rate}",
        "of the fair share": "**{share_of_fair:.0%}**",
        "in quiet / first code (range)": RATIO,
    }
    return table(columns, result["rows"])


def main() -> None:
    """Measure all models, beside them those of the commit `before` if one is named."""
    chosen = options(
        "bench.neighbour",
        __doc__,
        {"models": IN_FLIGHT},
        before="",
        models=list(IN_FLIGHT),
        rounds=3,
        seconds=4.0,
    )
    with ExitStack() as stack:
        sides: dict[str, Path | None] = {}
        if chosen.before:
            sides[chosen.before] = stack.enter_context(checked_out(chosen.before))
        sides["this"] = None
        result = {
            "machine": describe("bench.neighbour", "cpu", cores()),
            "rows": [
                row
                for model in chosen.models
                for row in rows(model, sides, chosen.rounds, chosen.seconds)
            ],
        }
    publish("neighbour-cpu", tables, result)


if __name__ == "__main__":
    main()
