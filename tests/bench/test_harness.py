"""What all measurements share."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bench import harness
from bench.harness import LATENCY, RATIO, alternate, options, publish, ratio, table, time_calls


def test_options_have_the_type_of_their_default(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults: dict[str, Any] = {
        "rounds": 3,
        "seconds": 0.5,
        "batches": [1, 8],
        "max_batch": 8,
        "device": "cpu",
    }
    monkeypatch.setattr(sys, "argv", ["x", "--batches", "4", "--max-batch", "2", "--seconds", "1"])
    chosen = options("bench.x", None, **defaults)
    assert vars(chosen) == {
        "rounds": 3,
        "seconds": 1.0,
        "batches": [4],
        "max_batch": 2,
        "device": "cpu",
    }


@pytest.mark.parametrize("words", [["--device", "tpu"], ["--models", "a", "c"], ["--rounds", "x"]])
def test_a_wrong_option_is_an_error(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *words])
    with pytest.raises(SystemExit):
        options("bench.x", None, {"models": ["a", "b"]}, models=["a"], device="cpu", rounds=1)


def test_sides_take_turns_and_ratios_are_taken_per_round() -> None:
    order = []
    taken = {"a": iter([99.0, 1.0, 10.0, 2.0]), "b": iter([99.0, 2.0, 30.0, 5.0])}

    def side(name: str) -> float:
        order.append(name)
        return next(taken[name])

    timed = alternate({"a": lambda: side("a"), "b": lambda: side("b")}, 3, unmeasured=1)
    assert order == ["a", "b"] * 4
    assert timed == {"a": [1.0, 10.0, 2.0], "b": [2.0, 30.0, 5.0]}
    assert ratio(timed["b"], timed["a"]) == {"ratio": 2.5, "ratio_range": [2.0, 3.0]}


def test_calls_go_on_until_the_time_is_over_and_there_is_one_at_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("bench.harness.time.perf_counter", lambda: float(next(clock)))
    assert time_calls(lambda: None, 0) == [1.0]
    assert time_calls(lambda: None, 5) == [1.0, 1.0]


def test_a_cell_has_the_words_of_a_format_and_three_more() -> None:
    row = {"size": [640, 480], "bytes": 2_500_000, "of": {"rate": 9.876}, "rate": 98.76}
    row |= {"ratio": 1.234, "ratio_range": [1, 2], "p50_ms": 1.6, "p90_ms": 2, "p99_ms": 30}
    columns = {
        "input": "{size:x}",
        "MB": "{bytes:/1e6 .1f}",
        "small": "{of[rate]:rate}",
        "large": "{rate:rate}",
        "ratio": RATIO,
        "ms": LATENCY,
    }
    assert table(columns, [row]).splitlines() == [
        "| input | MB | small | large | ratio | ms |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 640x480 | 2.5 | 9.88 | 98.8 | **1.23** (1.00-2.00) | 2 / 2 / 30 |",
    ]


def test_what_is_published_is_in_a_file_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    publish("x-cpu", lambda result: f"table of {result['rows']}", Namespace(rounds=2), rows=[1])
    result = json.loads((tmp_path / "x-cpu.json").read_text())
    assert (result["rows"], result["settings"]) == ([1], {"rounds": 2})
    assert result["machine"]["command"].startswith("python -m bench.x")
    assert "table of [1]" in capsys.readouterr().out
