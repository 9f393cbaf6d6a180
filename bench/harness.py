"""What all measurements share.

A script `bench/NAME.py` is written like this:

    chosen = options("bench.NAME", __doc__, device="cpu", rounds=5)  # its command line
    taken = alternate({"a": call_a, "b": call_b}, chosen.rounds)  # results by side, in turn
    rows = [{"side": side, **ratio(taken[side], taken["a"])} for side in taken]
    publish("NAME-cpu", tables, chosen, rows=rows)  # a result file, with machine and options

Its function `tables(result)` shows a result file as Markdown, made by `table(columns, rows)`;
`bench.report` asks the module that a file is named after. `time_calls` times one side in a round.
A server in a process of its own is `running_server(...)` (`bench.running_server`), and its method
`load(...)` sends requests from another process (`bench.load`) and returns the figures.
"""

import json
import os
import platform
import shlex
import string
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")
Row = dict[str, Any]

# Where result files go.
RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))
KNOWN = {"device": ("cpu", "cuda"), "dtype": ("float32", "bfloat16", "float16")}

# Cells that many tables have.
RATIO = "**{ratio:.2f}** ({ratio_range[0]:.2f}-{ratio_range[1]:.2f})"
LATENCY = "{p50_ms:.0f} / {p90_ms:.0f} / {p99_ms:.0f}"


def options(
    module: str,
    doc: str | None,
    choices: Mapping[str, Collection[str]] | None = None,
    **defaults: Any,
) -> Namespace:
    """Read the command line of a measurement.

    Args:
        module: that is run.
        doc: what it measures.
        choices: what some options may be; those of `device` and `dtype` are known.
        **defaults: the options and what they are by default, which says their type; a list takes
            several. `threads` are by default as many as torch has.
    """
    parser = ArgumentParser(prog=f"python -m {module}", description=doc)
    for name, given in defaults.items():
        default = torch_threads() if name == "threads" else given
        values = default if isinstance(default, list) else [default]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="*" if values is default else None,
            type=type(values[0]),
            choices=(KNOWN | dict(choices or {})).get(name),
            default=default,
            help=f"by default {' '.join(map(str, values))}",
        )
    return parser.parse_args()


def torch_threads() -> int:
    """With how many threads torch computes."""
    import torch  # noqa: PLC0415  # load generators need none

    return torch.get_num_threads()


def time_calls(call: Callable[[], object], seconds: float) -> list[float]:
    """Durations of consecutive calls, seconds; at least one, until `seconds` have passed."""
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while not durations or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return durations


def alternate(
    sides: Mapping[S, Callable[[], T]], rounds: int, *, unmeasured: int = 0
) -> dict[S, list[T]]:
    """Call all sides one after another in every round, so that what slows one slows all.

    Args:
        sides: by name.
        rounds: that are measured.
        unmeasured: rounds before them, whose results are thrown away.

    Returns:
        The results of each side, round by round.
    """
    taken = [{side: call() for side, call in sides.items()} for _ in range(unmeasured + rounds)]
    return {side: [one[side] for one in taken[unmeasured:]] for side in sides}


def ratio(of: Iterable[float], to: Iterable[float]) -> Row:
    """The ratio of two sides, taken in each round: its median and its range."""
    ratios = [one / other for one, other in zip(of, to, strict=True)]
    return {"ratio": median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """A table in Markdown.

    Args:
        columns: from titles to cells, in the language of `str.format` with the fields of a row.
            It has three words more: `/1e6 .1f` divides before it formats, `rate` has a decimal
            more for small numbers, and `x` is for the sides of a map or an image.
        rows: in order.
    """
    cells = _Cells()
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([cells.vformat(cell, (), row) for cell in columns.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class _Cells(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if format_spec == "x":
            return "x".join(map(str, value))
        if format_spec == "rate":
            format_spec = ".1f" if value >= 10 else ".2f"
        if format_spec.startswith("/"):
            divisor, _, format_spec = format_spec[1:].partition(" ")
            value /= float(divisor)
        return super().format_field(value, format_spec)


def in_short(counts: Mapping[str, int]) -> str:
    """How often each status was answered, in words."""
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def publish(name: str, tables: Callable[[Row], str], chosen: Namespace, **measured: object) -> None:
    """Write a result file, with the machine and the options, and print its tables.

    Args:
        name: of the file; up to its first hyphen that of the module in `bench`.
        tables: of that module.
        chosen: what the command line said.
        **measured: what was measured.
    """
    module, settings = f"bench.{name.partition('-')[0]}", vars(chosen)
    machine = describe(module, settings.get("device", "cpu"), settings.get("threads"))
    result = {"machine": machine, "settings": settings, **measured}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}\n\n{tables(result)}\n")


def describe(module: str, device: str, threads: int | None = None) -> dict[str, str | int]:
    """The machine, the versions, the commit and the command of this run of `python -m <module>`.

    Args:
        module: of this run.
        device: `cpu` or `cuda`.
        threads: that computed; `None` means those of the calling thread.
    """
    import torch  # noqa: PLC0415  # load generators need none

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{named['model name']} (family {named['cpu family']}, model {named['model']})"


def _commit() -> str:
    if carried := os.environ.get("BENCH_COMMIT"):
        return carried  # a tree that was carried elsewhere has no history
    commit = _git("describe", "--always", "--abbrev=12", "--exclude=*").stdout.strip()
    if not commit:
        return "unknown"  # an unpacked archive has no history
    # What the benchmark before this one wrote changes nothing that is measured.
    changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!bench/results").returncode
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *arguments], check=False, capture_output=True, text=True)
