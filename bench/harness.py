"""What all measurements share: the command line, rounds, ratios and the result file."""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median
from typing import Any, TypeVar

from bench.machine import RESULTS
from bench.tables import Row

S = TypeVar("S")
T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


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
    known = {"device": DEVICES, "dtype": DTYPES} | dict(choices or {})
    parser = ArgumentParser(prog=f"python -m {module}", description=doc)
    for name, given in defaults.items():
        default = torch_threads() if name == "threads" else given
        values = default if isinstance(default, list) else [default]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            nargs="*" if values is default else None,
            type=type(values[0]),
            choices=known.get(name),
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


def in_turn(sides: Mapping[S, Callable[[], T]], rounds: int) -> list[dict[S, T]]:
    """Call all sides one after another in every round, so that what slows one slows all."""
    return [{side: call() for side, call in sides.items()} for _ in range(rounds)]


def ratio(of: Iterable[float], to: Iterable[float]) -> Row:
    """The ratio of two sides, taken in each round: its median and its range."""
    ratios = [one / other for one, other in zip(of, to, strict=True)]
    return {"ratio": median(ratios), "ratio_range": [min(ratios), max(ratios)]}


def write(name: str, result: Row) -> None:
    """Write a result file.

    Args:
        name: of the file; up to its first hyphen that of the module in `bench`.
        result: what was measured, with the machine.
    """
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def publish(name: str, tables: Callable[[Row], str], result: Row) -> None:
    """Write a result file and print its tables, made by the function of its module."""
    write(name, result)
    print(f"{name}\n\n{tables(result)}\n")
