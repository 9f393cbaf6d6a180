"""`bench/gpu.sh` with an interpreter that only notes what it was asked for."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server import ROOT


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy of the script in a folder of its own, beside a profiler and an interpreter."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*" >> asked\ncase "$*" in *$FAILING*) exit 3; esac\n')
    ncu = tmp_path / "ncu"
    ncu.write_text('#!/bin/sh\necho "ncu ${*##*/}" >> asked\n')
    python.chmod(0o755)
    ncu.chmod(0o755)
    copy = tmp_path / "bench" / "gpu.sh"
    shutil.copy(ROOT / "bench" / "gpu.sh", copy)
    return copy


def run(script: Path, *steps: str, failing: str = "nothing") -> subprocess.CompletedProcess[str]:
    folder = script.parent.parent
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "PYTHON": str(folder / "python"),
        "FAILING": failing,
    }
    return subprocess.run(
        ["bash", script, *steps], env=environment, capture_output=True, text=True, timeout=30
    )


def asked(script: Path) -> list[str]:
    lines = (script.parent.parent / "asked").read_text("utf-8").splitlines()
    return [line.removeprefix("-m ").partition(" ")[0] for line in lines]


ALL = [
    *("pytest", "bench.kernels", "ncu", "bench.graphs", *3 * ["bench.engine"]),
    *("bench.growth", "bench.detector", "bench.server", "bench.report"),
]


def test_all_steps_run_one_after_the_other(script: Path) -> None:
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert asked(script) == ALL


def test_a_step_that_fails_is_named_and_does_not_stop_the_others(script: Path) -> None:
    ended = run(script, failing="float16")
    assert ended.returncode == 1
    assert asked(script) == ALL
    assert ended.stderr.splitlines()[-1] == (
        "failed: engine-bfloat16 engine-float16 growth detector"
    )


def test_steps_are_chosen_by_name(script: Path) -> None:
    ended = run(script, "report", "engine-float16")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert asked(script) == ["bench.engine", "bench.report"]


def test_an_unknown_step_is_an_error(script: Path) -> None:
    ended = run(script, "kernel")
    assert ended.returncode == 1
    assert "no such step: kernel; there are tests kernels profile " in ended.stderr
    assert not (script.parent.parent / "asked").exists()
