"""Compare our server with its peers, all with our engine and our pre-processing.

Only one server lives at a time. Every round begins each server anew, with another one first: it
has to answer as ours does, and answers 1, 8 and 32 requests in flight over keep-alive connections.
A peer that can be set up in two ways is tried in both before its first round, and goes on with the
better one. The ratio is to ours in the same round; ours is there twice.
"""

import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench.harness import Row, options, publish, ratio
from bench.peers import tables
from bench.peers.load import jpegs
from bench.peers.running import check, running
from bench.peers.sides import OURS, Predictions, Side, sides
from bench.weights import recipe_state
from service.models.load import BUNDLED

FIGURES = (
    *("requests_per_s", "p50_ms", "p90_ms", "p99_ms"),
    *("cpu_ms", "server_cpus", "client_cpus"),
)
TRIED = (8, 32)  # requests in flight, when the setting is chosen


class Visit(NamedTuple):
    """One life of a server: how long its first answer took, and its loads by requests in flight."""

    start_s: float
    loads: dict[int, Row]


class Comparison:
    """The servers with one model.

    Args:
        model: variables of the environment that say which (`DAT_MODEL__...`).
        seconds: of a window.
        warmup: before it, seconds.

    Attributes:
        failed: what did not work, and is left out.
    """

    def __init__(self, model: Mapping[str, str], seconds: float, warmup: float) -> None:
        self._model, self._window = model, (seconds, warmup)
        self._jpegs = jpegs()
        self._expected: list[Predictions] = []
        self.failed: list[Row] = []

    def visit(self, side: Side, setting: str, in_flight: Sequence[int]) -> Visit | None:
        """Begin a server, check its answers, load it and end it; `None` if it fails."""
        try:
            with running(side, side.settings[setting], self._model) as server:
                answers = [server.predictions(jpeg) for jpeg in self._jpegs]
                self._expected = self._expected or answers
                for found, expected in zip(answers, self._expected, strict=True):
                    check(found, expected)
                loads = {n: server.load(n, *self._window) for n in in_flight}
        except Exception as failure:  # whatever one does, the others are measured
            why = f"{type(failure).__name__}: {str(failure)[-2000:]}"
            print(f"{side.name} ({setting}) failed: {why}", flush=True)
            self.failed.append({"side": side.name, "setting": setting, "why": why})
            return None
        rates = ", ".join(f"{n}: {row['requests_per_s']:.1f}" for n, row in loads.items())
        print(f"{side.name} ({setting}): {server.start_s:.1f} s, requests/s {rates}", flush=True)
        return Visit(server.start_s, loads)

    def choose(self, side: Side) -> str | None:
        """The best setting of a server; `None` if it works with none."""
        if len(side.settings) == 1:
            return next(iter(side.settings))
        visits = {setting: self.visit(side, setting, TRIED) for setting in side.settings}
        rates = {
            setting: prod(row["requests_per_s"] for row in visit.loads.values())
            for setting, visit in visits.items()
            if visit is not None
        }
        return max(rates, key=lambda setting: rates[setting], default=None)


def compare(
    comparison: Comparison, compared: Sequence[Side], in_flight: Sequence[int], rounds: int
) -> Row:
    """All rounds; what fails in one is left out of the others and of the result.

    The first server says what the others should answer, and the ratios are to it.
    """
    chosen: dict[Side, str | None] = {}
    visits: dict[Side, list[Visit]] = {side: [] for side in compared}
    for number in range(rounds):
        left = [*visits]
        first = number * len(left) // rounds
        for side in left[first:] + left[:first]:
            if side not in chosen:
                chosen[side] = comparison.choose(side)
            setting = chosen[side]
            visit = None if setting is None else comparison.visit(side, setting, in_flight)
            if visit is None:
                del visits[side]
            else:
                visits[side].append(visit)
    assert compared[0] in visits, f"{compared[0].name} does not answer"
    return {
        "servers": [
            {
                "side": side.name,
                "setting": chosen[side],
                "start_s": median(visit.start_s for visit in lives),
                "memory": median(visit.loads[in_flight[-1]]["memory"] for visit in lives),
            }
            for side, lives in visits.items()
        ],
        "loads": [
            {"side": side.name, "concurrency": n, **_over_rounds(lives, visits[compared[0]], n)}
            for n in in_flight
            for side, lives in visits.items()
        ],
        "failed": comparison.failed,
    }


def _over_rounds(lives: Sequence[Visit], ours: Sequence[Visit], in_flight: int) -> dict[str, Any]:
    rows = [visit.loads[in_flight] for visit in lives]
    statuses = Counter[str]()
    for row in rows:
        statuses.update(row["statuses"])
    return {
        **{key: median(row[key] for row in rows) for key in FIGURES},
        **ratio(
            (row["requests_per_s"] for row in rows),
            (visit.loads[in_flight]["requests_per_s"] for visit in ours),
        ),
        "statuses": dict(statuses),
        "rounds": rows,
    }


def main() -> None:
    """Compare with each model of the command line, write its result file and print its tables."""
    known = {side.name: side for side in sides()}
    chosen = options(
        "bench.peers",
        __doc__,
        {"servers": known},
        models=["dat_nano"],
        servers=list(known),
        concurrency=[1, 8, 32],
        rounds=3,
        seconds=4.0,
        warmup=1.0,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and nothing of a server is left
    compared = [known[name] for name in dict.fromkeys([OURS[0].name, *chosen.servers])]
    for name in chosen.models:
        with tempfile.TemporaryDirectory() as folder:
            model = {"DAT_MODEL__NAME": name}
            if name not in BUNDLED:
                checkpoint = Path(folder) / "weights.pth"
                torch.save({"model": recipe_state(name)}, checkpoint)
                model["DAT_MODEL__CHECKPOINT"] = str(checkpoint)
            comparison = Comparison(model, chosen.seconds, chosen.warmup)
            found = compare(comparison, compared, chosen.concurrency, chosen.rounds)
        publish(f"peers-{name}-cpu", tables, chosen, model=name, **found)


if __name__ == "__main__":
    main()
