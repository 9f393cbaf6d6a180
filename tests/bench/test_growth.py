"""How growth is measured, and that its picture shows what was measured."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import growth, growth_chart
from bench.growth import _heap_memory, durations, line_past_the_knee, make_batch, tables
from bench.harness import RESULTS
from bench.memory import IN_USE_ALONE, in_own_process, peak, reset_peak, resident
from service.engine.items import ClassificationInput

MIB = 1 << 20
FILES = sorted(RESULTS.glob("growth-*.json"))


def test_the_line_goes_through_what_lies_past_the_knee() -> None:
    batches = [1, 2, 4, 8, 16, 32]
    line = line_past_the_knee(batches, [20.0, *(0.5 + 3 * batch for batch in batches[1:])])
    assert line["from_batch"] == 2
    assert line["of_an_image"] == pytest.approx(3)
    assert line["of_a_batch"] == pytest.approx(0.5)
    assert line["r2"] == pytest.approx(1)
    assert line["largest_deviation"] == pytest.approx(0, abs=1e-9)


def test_a_bend_past_the_knee_is_seen() -> None:
    line = line_past_the_knee([1, 2, 3], [1.0, 2.0, 3.3])
    assert line["from_batch"] == 1
    assert line["r2"] < 0.995
    assert line["largest_deviation"] > 0.03


def test_three_batches_are_past_the_knee_at_least() -> None:
    assert line_past_the_knee([1, 2, 4, 8], [8.0, 8.0, 8.5, 9.0])["from_batch"] == 2


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


def test_the_first_images_of_a_batch_are_explained() -> None:
    batch = make_batch(3, 64, explained=2)
    assert [item.wanted.points for item in batch] == [True, True, False]
    assert {item.pixels.shape for item in batch} == {(64, 64, 3)}


def peaks() -> tuple[int, int]:
    """Bytes above the level before, of a peak, and of the time after it."""
    before = resident()
    reset_peak()
    np.ones(64 * MIB, np.uint8)
    first = peak() - before
    reset_peak()
    return first, peak() - before


def test_the_peak_is_seen_after_it_is_over() -> None:
    # In a process whose heap has nothing free that the peak could take instead.
    first, after = in_own_process(IN_USE_ALONE, peaks)
    assert 60 * MIB < first < 96 * MIB
    assert after < 32 * MIB


def test_memory_of_a_batch_is_what_it_takes_beside_the_engine() -> None:
    class Loaded:
        def __init__(self) -> None:
            self.weights = np.ones(128 * MIB, np.uint8)

        def run(self, batch: Sequence[ClassificationInput]) -> None:
            np.ones(len(batch) * 16 * MIB, np.uint8)

    load: Any = Loaded
    assert 60 * MIB < _heap_memory(load, make_batch(4, 8)) < 96 * MIB


def test_a_process_of_its_own_has_its_own_environment() -> None:
    name = "GROWTH_TEST"
    assert in_own_process({name: "1"}, os.getenv, name) == "1"
    assert name not in os.environ
    assert in_own_process({}, os.getpid) != os.getpid()


@pytest.mark.parametrize(
    ("largest", "expected"), [(32, [0, 8, 16, 24, 32]), (8, [0, 2, 4, 6, 8]), (0.9, [0, 0.2, 0.4])]
)
def test_ticks_are_round_and_reach_the_largest(largest: float, expected: list[float]) -> None:
    ticks = growth_chart.ticks(largest)
    assert ticks[: len(expected)] == pytest.approx(expected)
    assert ticks[-2] < largest <= ticks[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tables_and_picture_hold_every_point(path: Path) -> None:
    result = json.loads(path.read_text())
    shown = tables(result)
    measured = [*result["batch"]["rows"], *result["size"], *result["models"]]
    others = [*result["explained"]["rows"], *result["engine_memory"], *result["server_memory"]]
    rows = [line for line in shown.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) == len(measured) + len(others) + 6, "a header for each table"

    picture = ElementTree.fromstring(growth_chart.draw([result]))
    circles = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    points = 2 * len(result["batch"]["rows"]) + len(result["size"]) + len(result["models"])
    assert len(circles) == points + 1, "one is in the legend"


def test_the_picture_in_the_documentation_is_of_the_results() -> None:
    cpu = [
        json.loads((RESULTS / f"growth-{name}-cpu-float32.json").read_text())
        for name in ("dat_tiny_224", "dat_pp_tiny_224")
    ]
    assert growth_chart.OUT.read_text() == growth_chart.draw(cpu)
