"""Results say which code they are of."""

import subprocess
from pathlib import Path

import pytest
import torch

from bench.harness import describe


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@localhost")
    done = subprocess.run(
        ["git", *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit() -> object:
    return describe("bench.engine", "cpu", torch.get_num_threads())["commit"]


def test_a_change_of_code_is_told_and_one_of_results_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, results = tmp_path / "code.py", tmp_path / "bench" / "results" / "engine.json"
    results.parent.mkdir(parents=True)
    assert commit() == "unknown"
    code.write_text("1")
    results.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    name = git("rev-parse", "--short=12", "HEAD")

    results.write_text("2")
    assert commit() == name
    code.write_text("2")
    assert commit() == f"{name}-dirty"
