"""Measure the server against the number of its front ends.

With a model that answers at once (`bench.null_server`), which shows what transports and decoders
can do, and with the demo model. No front end means one process for all. HTTP has a connection for
each request in flight, which the supervisor hands out; gRPC has one connection, or several, which
the kernel hands out. One server is alive at a time.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from statistics import median

from bench.harness import RATIO, Row, alternate, options, publish, ratio, table
from bench.running_server import running_server

MODEL = "dat_nano"
PROGRAMS = {"null": "bench.null_server", "demo": "service"}
WIRES = {
    "HTTP": ("http", 1),
    "gRPC, one connection": ("grpc", 1),
    "gRPC, eight": ("grpc", 8),
}
Load = tuple[str, int]  # over which wire, and how many in flight


def measure(model: str, front_ends: int, loads: Sequence[Load], seconds: float) -> dict[Load, Row]:
    """What one server answers to each load, one after the other."""
    found = {}
    program, shape = PROGRAMS[model], {"DAT_SERVER__FRONT_ENDS": front_ends}
    with running_server(None, program, DAT_MODEL__NAME=MODEL, **shape) as server:
        for wire, in_flight in loads:
            protocol, channels = WIRES[wire]
            found[wire, in_flight] = server.load(
                protocol, channels=channels, concurrency=in_flight, seconds=seconds, warmup=1
            )
    return found


def summary(rounds: Sequence[Row], firsts: Sequence[Row], seconds: float) -> Row:
    """The medians of one load, beside the server with the first number of front ends."""
    rates = [figures["answered_per_s"] for figures in rounds]
    answered = {
        name: [
            1e3 * figures["cpu_s_by_process"].get(name, 0.0) / (seconds * rate)
            for figures, rate in zip(rounds, rates, strict=True)
        ]
        for name in rounds[0]["cpu_s_by_process"]
    }
    return {
        **{key: median(one[key] for one in rounds) for key in ("p50_ms", "p99_ms")},
        "answered_per_s": median(rates),
        **ratio(rates, (figures["answered_per_s"] for figures in firsts)),
        "cpu_ms": {name: median(of) for name, of in answered.items()},
        "client_cpus": median(one["client_cpu_s"] for one in rounds) / seconds,
        "rounds": rounds,
    }


def tables(result: Row) -> str:
    """The table of `scale-cpu.json`."""
    columns = {
        "model": "{model}",
        "wire": "{wire}",
        "in flight": "{in_flight}",
        "front ends": "{front_ends}",
        "answers/s": "{answered_per_s:rate}",
        "to the first (range)": RATIO,
        "p50 / p99 ms": "{p50_ms:.1f} / {p99_ms:.1f}",
        "ms of CPU for an answer: supervisor": "{supervisor}",
        "front ends, each": "{each_front_end}",
        "workers": "{workers}",
        "all": "**{all:.2f}**",
        "client CPUs": "{client_cpus:.2f}",
    }
    return table(columns, (row | _by_kind(row["cpu_ms"]) for row in result["rows"]))


def _by_kind(cpu_ms: dict[str, float]) -> Row:
    def of(kind: str) -> str:
        shown = " + ".join(f"{ms:.2f}" for name, ms in cpu_ms.items() if name.startswith(kind))
        return shown or "-"

    return {
        "supervisor": of("supervisor"),
        "each_front_end": of("front-end"),
        "workers": of("worker"),
        "all": sum(cpu_ms.values()),
    }


def main() -> None:
    """Measure all numbers of front ends, in turn."""
    chosen = options(
        "bench.scale",
        __doc__,
        {"models": PROGRAMS},
        models=list(PROGRAMS),
        front_ends=[0, 1, 2, 3, 4],
        in_flight=[8, 32, 64],
        rounds=3,
        seconds=3.0,
    )
    loads = list(product(WIRES, chosen.in_flight))
    servers = {
        (model, front_ends): partial(measure, model, front_ends, loads, chosen.seconds)
        for model, front_ends in product(chosen.models, chosen.front_ends)
    }
    taken = alternate(servers, chosen.rounds)

    def rounds_of(model: str, front_ends: int, load: Load) -> list[Row]:
        return [one[load] for one in taken[model, front_ends]]

    rows = [
        {
            "model": model,
            "wire": load[0],
            "in_flight": load[1],
            "front_ends": front_ends,
            **summary(
                rounds_of(model, front_ends, load),
                rounds_of(model, chosen.front_ends[0], load),
                chosen.seconds,
            ),
        }
        for model, load, front_ends in product(chosen.models, loads, chosen.front_ends)
    ]
    publish("scale-cpu", tables, chosen, rows=rows)


if __name__ == "__main__":
    main()
