"""Measure a server that is asked for many times what it can answer.

The server answers the demo model. Its capacity is what it answers with 32 requests in flight, asked
by the same clients on the same cores; then requests come at a multiple of that rate, whether or not
the ones before were answered (`bench.crowd`). Then there are storms of callers that leave after
50 ms and ask again at once, and do or do not say so beforehand.
"""

import argparse
import json
import urllib.request
from statistics import median
from typing import Any

from bench.machine import RESULTS, describe
from bench.report import overload_tables
from bench.running_server import RunningServer, running_server
from service.machine import cores

MODEL = "dat_nano"
PATIENCE_S = 0.05
IN_FLIGHT = 32


def metric(server: RunningServer, name: str) -> float:
    """The sum of a metric over its labels, but those of another kind."""
    url = f"http://127.0.0.1:{server.ports['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def overload(
    server: RunningServer, times: float, seconds: float, **crowd: object
) -> dict[str, Any]:
    """One trial: capacity before, the crowd, and what is answered just after it."""
    before = server.crowd(concurrency=IN_FLIGHT, seconds=seconds / 4, warmup=1, **crowd)
    capacity = before["answered_per_s"]
    during = server.crowd(rate=times * capacity, seconds=seconds, warmup=2, **crowd)
    # The first two seconds are given to the recovery.
    after = server.crowd(concurrency=IN_FLIGHT, seconds=seconds / 4, warmup=2, **crowd)
    return {
        "times": times,
        "capacity_per_s": capacity,
        "offered_per_s": during["requests_per_s"],
        "goodput_per_s": during["answered_per_s"],
        "goodput": during["answered_per_s"] / capacity,
        "refused_ms": during["latency_ms"].get("429"),
        "answered_ms": during["latency_ms"].get("200"),
        "probes_ms": during["probes"]["latency_ms"].get("200"),
        "statuses": during["statuses"],
        "recovered": after["answered_per_s"] / capacity,
        "server_cpus": during["server_cpus"],
        "client_cpus": during["client_cpus"],
    }


def storm(server: RunningServer, rate: float, seconds: float, path: str) -> dict[str, Any]:
    """Callers that leave after 50 ms and ask again, and how much was computed for them."""
    rows, wasted = (
        'dat_batch_images_total{kind="real"',
        "dat_images_abandoned_total",
    )
    computed, abandoned = metric(server, rows), metric(server, wasted)
    figures = server.crowd(
        rate=rate, seconds=seconds, warmup=3, path=path, leave_after=PATIENCE_S, ask_again=3
    )
    computed = metric(server, rows) - computed
    return {
        "path": path,
        "rate_per_s": rate,
        "answered_per_s": figures["answered_per_s"],
        "computed": computed,
        "wasted": (metric(server, wasted) - abandoned) / max(1.0, computed),
        "statuses": figures["statuses"],
        "probes_ms": figures["probes"]["latency_ms"].get("200"),
    }


def main() -> None:
    """Measure, write the result file and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    parser.add_argument("--times", nargs="+", type=float, default=[2.0, 4.0, 10.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="of an overload")
    arguments = parser.parse_args()
    places: dict[str, dict[str, object]] = {
        "a core of their own": {"core": cores() - 1},
        "any core": {},
    }
    found: list[dict[str, Any]] = []
    with running_server(None, DAT_MODEL__NAME=MODEL) as server:
        for _ in range(arguments.rounds):
            for where, crowd in places.items():
                for times in arguments.times:
                    row = overload(server, times, arguments.seconds, **crowd)
                    found.append({"clients": where, **row})
        capacity = median(row["capacity_per_s"] for row in found)
        storms = [
            storm(server, 3 * capacity, arguments.seconds, path)
            for path in ("/v1/classify", f"/v1/classify?timeout={PATIENCE_S}")
        ]
    result = {
        "machine": describe("bench.overload", "cpu", cores()),
        "overload": found,
        "storms": storms,
        "storm_seconds": arguments.seconds,
    }
    path = RESULTS / "overload-cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(overload_tables(result))


if __name__ == "__main__":
    main()
