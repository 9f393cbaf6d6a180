"""Measure a server that is asked for many times what it can answer.

The server answers the demo model. Its capacity is what it answers with 32 requests in flight, asked
by the same clients on the same cores; then requests come at a multiple of that rate, whether or not
the ones before were answered (`bench.load`). Then there are storms of callers that leave after
50 ms and ask again at once, and do or do not say so beforehand.

All that is asked of one process, and of front ends with a worker. There it is told what CPU time
the worker has, with requests in flight and in the crowd: refusals should not take it.
"""

from statistics import median

import httpx

from bench.harness import RATIO, Row, in_short, options, publish, ratio, table
from bench.running_server import RunningServer, running_server
from service.machine import cores

MODEL = "dat_nano"
PATIENCE_S = 0.05
PROBE_EVERY_S = 0.1
IN_FLIGHT = 32


def metric(server: RunningServer, name: str) -> float:
    """The sum of a metric over its labels, but those of another kind."""
    text = httpx.get(f"http://127.0.0.1:{server.ports['metrics']}/metrics", timeout=30).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def overload(server: RunningServer, times: float, seconds: float, **crowd: object) -> Row:
    """One trial: capacity before, the crowd, and what is answered just after it."""
    before = server.load("http", concurrency=IN_FLIGHT, seconds=seconds / 4, warmup=1, **crowd)
    capacity = before["answered_per_s"]
    offered = {"rate": times * capacity, "probe_every": PROBE_EVERY_S}
    during = server.load("http", seconds=seconds, warmup=2, **offered, **crowd)
    # The first two seconds are given to the recovery.
    after = server.load("http", concurrency=IN_FLIGHT, seconds=seconds / 4, warmup=2, **crowd)
    return {
        "times": times,
        "capacity_per_s": capacity,
        "goodput_per_s": during["answered_per_s"],
        "goodput": during["answered_per_s"] / capacity,
        "refused_ms": during["latency_ms"].get("429"),
        "probes_ms": during["probes"]["latency_ms"].get("200"),
        "statuses": during["statuses"],
        "recovered": after["answered_per_s"] / capacity,
        "server_cpus": during["server_cpu_s"] / seconds,
        "client_cpus": during["client_cpu_s"] / seconds,
        "worker_cpus": [_worker_cpu_s(before) / (seconds / 4), _worker_cpu_s(during) / seconds],
    }


def _worker_cpu_s(figures: Row) -> float:
    """CPU seconds of all workers."""
    used = figures["cpu_s_by_process"]
    return float(sum(used[name] for name in used if name.startswith("worker")))


def storm(server: RunningServer, rate: float, seconds: float, path: str) -> Row:
    """Callers that leave after 50 ms and ask again, and how much was computed for them."""
    rows, wasted = 'dat_batch_images_total{kind="real"', "dat_images_abandoned_total"
    computed, abandoned = metric(server, rows), metric(server, wasted)
    callers = {"rate": rate, "leave_after": PATIENCE_S, "ask_again": 3}
    figures = server.load(
        "http", seconds=seconds, warmup=3, path=path, probe_every=PROBE_EVERY_S, **callers
    )
    computed = metric(server, rows) - computed
    return {
        "path": path,
        "answered_per_s": figures["answered_per_s"],
        "computed": computed,
        "wasted": (metric(server, wasted) - abandoned) / max(1.0, computed),
        "statuses": figures["statuses"],
        "probes_ms": figures["probes"]["latency_ms"].get("200"),
    }


def tables(result: Row) -> str:
    """The tables of `overload-cpu.json`."""
    overloads = {
        "front ends": "{front_ends}",
        "clients have": "{clients}",
        "asked for, of capacity": "{times:g}",
        "capacity, answers/s": "{capacity_per_s:rate}",
        "answered / capacity (range)": RATIO,
        "refused p50 / p99 ms": "{refused}",
        "probes p50 / p99 ms": "{probes}",
        "two seconds later, of capacity": "{recovered:.2f}",
        "server CPUs": "{server_cpus:.2f}",
        "workers' CPUs before / then": "{workers}",
        "clients' CPUs": "{client_cpus:.2f}",
    }
    storms = {
        "front ends": "{front_ends}",
        "callers who leave after 50 ms": "`{path}`",
        "requests/s": "{requests_per_s:.0f}",
        "answers/s": "{answered_per_s:rate}",
        "computed for nobody": "**{wasted:.1%}**",
        "probes p50 / p99 ms": "{probes}",
        "answers": "{answers}",
    }
    # What older files do not say.
    was = {"front_ends": 0}
    trials: dict[tuple[int, str, float], list[Row]] = {}
    for row in (was | row for row in result["overload"]):
        trials.setdefault((row["front_ends"], row["clients"], row["times"]), []).append(row)
    storm_rows = [
        was
        | row
        | {
            "requests_per_s": sum(row["statuses"].values()) / result["storm_seconds"],
            "probes": _latency([row], "probes_ms"),
            "answers": in_short(row["statuses"]),
        }
        for row in result["storms"]
    ]
    of_trials = table(overloads, (_over_all_rounds(rounds) for rounds in trials.values()))
    return f"{of_trials}\n\n{table(storms, storm_rows)}"


def _over_all_rounds(rounds: list[Row]) -> Row:
    medians = ("capacity_per_s", "recovered", "server_cpus", "client_cpus")
    answered = (row["goodput_per_s"] for row in rounds)
    return rounds[0] | {
        **{key: median(row[key] for row in rounds) for key in medians},
        **ratio(answered, (row["capacity_per_s"] for row in rounds)),
        "refused": _latency(rounds, "refused_ms"),
        "probes": _latency(rounds, "probes_ms"),
        "workers": _worker_cpus(rounds),
    }


def _worker_cpus(rounds: list[Row]) -> str:
    if not rounds[0]["front_ends"]:
        return "-"
    before, then = (median(row["worker_cpus"][when] for row in rounds) for when in (0, 1))
    return f"{before:.2f} / {then:.2f}"


def _latency(rounds: list[Row], key: str) -> str:
    had = [row[key] for row in rounds if row[key]]
    shown = (f"{median(one[rank] for one in had):.1f}" for rank in ("p50", "p99") if had)
    return " / ".join(shown) or "none"


def main() -> None:
    """Measure, write the result file and print its tables."""
    chosen = options(
        "bench.overload",
        __doc__,
        front_ends=[0, cores()],
        times=[2.0, 4.0, 10.0],
        rounds=3,
        seconds=30.0,
    )
    places: dict[str, dict[str, object]] = {
        "a core of their own": {"core": cores() - 1},
        "any core": {},
    }
    seconds = chosen.seconds
    found: list[Row] = []
    storms: list[Row] = []
    for front_ends in chosen.front_ends:
        shape = {"front_ends": front_ends}
        with running_server(
            None, DAT_MODEL__NAME=MODEL, DAT_SERVER__FRONT_ENDS=front_ends
        ) as server:
            trials = [
                shape | {"clients": where, **overload(server, times, seconds, **crowd)}
                for _ in range(chosen.rounds)
                for where, crowd in places.items()
                for times in chosen.times
            ]
            capacity = median(row["capacity_per_s"] for row in trials)
            found += trials
            storms += [
                shape | storm(server, 3 * capacity, seconds, path)
                for path in ("/v1/classify", f"/v1/classify?timeout={PATIENCE_S}")
            ]
    publish("overload-cpu", tables, chosen, overload=found, storms=storms, storm_seconds=seconds)


if __name__ == "__main__":
    main()
