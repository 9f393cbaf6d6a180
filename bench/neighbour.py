"""Measure a server whose cores a neighbour wants as well, beside the same server in quiet.

The neighbour is one process that never waits. It has half of the core that both want, so a fair
share is all the cores but half of one. The code of another commit can be measured in the same
rounds: each side is a server of its own, all are started before the first round, and while one
works the others idle.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import RESULTS, describe
from bench.report import neighbour_table
from bench.running_server import RunningServer, running_server
from bench.weights import recipe_state
from service.machine import cores

DEMO = "dat_nano"
IN_FLIGHT = {DEMO: [1, 8, 32], "dat_tiny_224": [1, 8], "dat_pp_tiny_224": [1, 8]}


@dataclass(frozen=True)
class Trial:
    """What is measured at a time: a model, how many requests are in flight, and beside whom."""

    model: str
    in_flight: int
    crowded: bool


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


def open_servers(
    model: str, sides: dict[str, Path | None], stack: ExitStack
) -> dict[str, RunningServer]:
    """A server of the model for each side."""
    checkpoint = None if model == DEMO else {"model": recipe_state(model)}
    settings: dict[str, object] = {"DAT_MODEL__NAME": model}
    return {
        side: stack.enter_context(running_server(checkpoint, source, **settings))
        for side, source in sides.items()
    }


def measure(server: RunningServer, trial: Trial, seconds: float) -> float:
    """Answers a second."""
    with ExitStack() as stack:
        if trial.crowded:
            stack.enter_context(neighbour())
        figures = server.crowd(concurrency=trial.in_flight, seconds=seconds, warmup=1)
    return float(figures["answered_per_s"])


def rows(
    model: str, sides: dict[str, Path | None], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One row for each number of requests in flight and each side."""
    with ExitStack() as stack:
        servers = open_servers(model, sides, stack)
        rates: dict[tuple[str, int, bool], list[float]] = {}
        for _ in range(rounds):
            for in_flight in IN_FLIGHT[model]:
                for crowded in (False, True):
                    for side, server in servers.items():
                        rate = measure(server, Trial(model, in_flight, crowded), seconds)
                        rates.setdefault((side, in_flight, crowded), []).append(rate)
    first = next(iter(sides))
    fair = (cores() - 0.5) / cores()
    found = []
    for in_flight in IN_FLIGHT[model]:
        for side in sides:
            in_quiet, beside = rates[side, in_flight, False], rates[side, in_flight, True]
            shares = [with_it / alone for with_it, alone in zip(beside, in_quiet, strict=True)]
            ratios = [
                ours / theirs
                for ours, theirs in zip(in_quiet, rates[first, in_flight, False], strict=True)
            ]
            found.append(
                {
                    "model": model,
                    "in_flight": in_flight,
                    "code": side,
                    "quiet_per_s": median(in_quiet),
                    "crowded_per_s": median(beside),
                    "share_of_fair": median(shares) / fair,
                    "ratio": median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
            )
    return found


def main() -> None:
    """Measure all models, write the result file and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench.neighbour", description=__doc__)
    parser.add_argument("--before", help="a commit that is measured in the same rounds")
    parser.add_argument("--models", nargs="+", choices=IN_FLIGHT, default=list(IN_FLIGHT))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        sides: dict[str, Path | None] = {}
        if arguments.before:
            sides[arguments.before] = stack.enter_context(checked_out(arguments.before))
        sides["this"] = None
        result = {
            "machine": describe("bench.neighbour", "cpu", cores()),
            "rows": [
                row
                for model in arguments.models
                for row in rows(model, sides, arguments.rounds, arguments.seconds)
            ],
        }
    path = RESULTS / "neighbour-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(neighbour_table(result))


if __name__ == "__main__":
    main()
