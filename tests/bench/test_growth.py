"""How growth is measured, and that its tables show what was measured."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench import growth
from bench.growth import durations, tables
from bench.harness import RESULTS
from bench.memory import IN_USE_ALONE, in_own_process, most_taken, peak, reset_peak, resident

MIB = 1 << 20
FILES = sorted(RESULTS.glob("growth-*.json"))


def test_calls_alternate_the_first_round_does_not_count_and_ratios_are_taken_per_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = iter([99.0, 99.0, 1.0, 2.0, 10.0, 30.0, 2.0, 5.0])
    monkeypatch.setattr(growth, "time_calls", lambda call, _: [call(), next(taken), 1000])
    called = ""

    def call(name: str) -> int:
        nonlocal called
        called += name
        return 0

    first, second = durations([partial(call, "a"), partial(call, "b")], rounds=3, seconds=0)
    assert called == "abababab"
    assert first == {"ms": 2000.0, "ratio": 1.0, "ratio_range": [1.0, 1.0]}
    assert second == {"ms": 5000.0, "ratio": 2.5, "ratio_range": [2.0, 3.0]}


def peaks() -> tuple[int, int]:
    """Bytes above the level before, of a peak, and of the time after it."""
    before = resident()
    reset_peak()
    np.ones(64 * MIB, np.uint8)
    first = peak() - before
    reset_peak()
    return first, peak() - before


@pytest.mark.slow
def test_the_peak_is_seen_after_it_is_over() -> None:
    # In a process whose heap has nothing free that the peak could take instead.
    first, after = in_own_process(IN_USE_ALONE, peaks)
    assert 60 * MIB < first < 96 * MIB
    assert after < 32 * MIB


def test_memory_of_a_call_is_what_it_takes_beside_what_was_there() -> None:
    weights = np.ones(128 * MIB, np.uint8)
    taken = most_taken(lambda: np.ones(64 * MIB, np.uint8))
    assert 60 * MIB < taken < 96 * MIB
    assert weights.all()


def test_a_process_of_its_own_has_its_own_environment() -> None:
    name = "GROWTH_TEST"
    assert in_own_process({name: "1"}, os.getenv, name) == "1"
    assert name not in os.environ
    assert in_own_process({}, os.getpid) != os.getpid()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_tables_hold_every_point(path: Path) -> None:
    result = json.loads(path.read_text())
    rows = [line for line in tables(result).splitlines() if line and "---" not in line]
    measured = (result["batch"]["rows"], result["size"], result["models"], result["server_memory"])
    assert len(rows) == sum(map(len, measured)) + 4, "a header for each table"
