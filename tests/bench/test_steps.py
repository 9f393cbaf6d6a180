"""A step fails or is cut without harm to the others."""

import io
import sys
import time
from pathlib import Path

import pytest

from bench import steps
from bench.findings import bound, verdict
from bench.gpu import choose
from bench.steps import Part, Step


def step(name: str, code: str, limit_s: float = 30) -> Step:
    return Step(name, limit_s, (sys.executable, "-c", code))


ROW = """print('{"row": 1}', flush=True)\n"""


def test_steps_side_by_side_end_each_in_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GRACE_S", 0.5)
    log = io.StringIO()
    child = tmp_path / "child"
    hangs = (
        f"{ROW}import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); print('hangs'); time.sleep(60)\n"
    )
    part = Part(log, 30, tmp_path)
    began = time.monotonic()
    outcomes = part.run(
        [
            step("good", f"import os; {ROW}print('{{'); print(os.environ['BENCH_RESULTS'])"),
            step("bad", f"{ROW}raise SystemExit(3)"),
            step("hangs", hangs, limit_s=1),
            step("missing", "import no_such_module"),
        ]
    )
    assert time.monotonic() - began < 20
    assert [(outcome.name, outcome.ended, outcome.rows) for outcome in outcomes] == [
        ("good", "ok", [{"row": 1}]),
        ("bad", "failed with exit code 3", [{"row": 1}]),
        ("hangs", "cut after 1 s", [{"row": 1}]),
        ("missing", "failed with exit code 1", []),
    ]
    lines = log.getvalue().splitlines()
    assert f"good: {tmp_path}" in lines
    assert any(line.startswith("missing: ModuleNotFoundError") for line in lines)
    assert any(line == "hangs: hangs" for line in lines)
    # Dead in a moment, though nobody may ask how it ended.
    stat = Path(f"/proc/{child.read_text()}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


def test_a_part_ends_on_time_whatever_its_steps_may_take(tmp_path: Path) -> None:
    part = Part(io.StringIO(), 1, tmp_path)
    first, second = (part.run([step(name, "import time; time.sleep(60)")])[0] for name in "ab")
    assert first.ended == "cut after 1 s"
    assert (second.ended, second.rows) == ("left out, its part has no time left", [])


def test_steps_are_chosen_by_name_or_by_how_it_begins() -> None:
    groups = [
        [step(name, "") for name in group]
        for group in (["environment"], ["a-1", "a-2", "b"], ["ab"])
    ]

    def chosen(*wanted: str) -> list[list[str]]:
        return [[one.name for one in group] for group in choose(groups, wanted)]

    assert chosen() == [["environment"], ["a-1", "a-2", "b"], ["ab"]]
    assert chosen("a") == [["environment"], ["a-1", "a-2"]]
    assert chosen("ab", "a-2") == [["environment"], ["a-2"], ["ab"]]
    with pytest.raises(ValueError, match="no step is called c; there are environment, a-1, "):
        chosen("a", "c")


@pytest.mark.parametrize(
    ("row", "says", "in_words"),
    [
        ({"figure": 1.0}, "", ""),
        ({"figure": 1.0, "at_most": 1}, "met", "at most 1"),
        ({"figure": 1.1, "at_most": 1.0}, "missed", "at most 1"),
        ({"figure": 1.0, "at_least": 1.5}, "missed", "at least 1.5"),
        ({"figure": 2.0, "at_least": 1.5}, "met", "at least 1.5"),
        ({"figure": float("nan"), "at_most": 1.0}, "missed", "at most 1"),
        ({"figure": float("nan"), "at_least": 1.0}, "missed", "at least 1"),
    ],
)
def test_a_figure_keeps_its_bound_or_misses_it(
    row: dict[str, float], says: str, in_words: str
) -> None:
    assert (verdict(row), bound(row)) == (says, in_words)
