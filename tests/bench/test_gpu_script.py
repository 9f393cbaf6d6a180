"""A rehearsal of `bench/gpu.sh` on a CPU: every step runs, on models as small as they get."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import CHECKED, first, second, tables
from tests.server import ROOT

MODELS = ("dat_nano", "mask_rcnn_dat_nano", "no_such_model")


def start(part: str, folder: Path, *steps: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "DEVICE": "cpu",
        "OUT": str(folder),
        "MODELS": " ".join(MODELS),
        "PYTHON": sys.executable,
        # Threads that wait for each other awake are most of what a small model costs.
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", "bench/gpu.sh", part, *steps],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, int]]:
    """Of both parts: the folder with what came of it, what was printed, and the exit code."""
    folders = {part: tmp_path_factory.mktemp(part) for part in ("first", "second")}
    started = {part: start(part, folder) for part, folder in folders.items()}
    printed = {part: process.communicate(timeout=850)[0] for part, process in started.items()}
    return {
        part: (folder, printed[part], started[part].returncode) for part, folder in folders.items()
    }


def results(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"gpu-{part}-cpu.json").read_text("utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_part_checks_and_times_and_names_what_failed(
    rehearsed: dict[str, tuple[Path, str, int]],
) -> None:
    folder, printed, code = rehearsed["first"]
    found = results(folder, "first")
    ended = {step["name"]: step["ended"] for step in found["steps"]}
    checks = [f"check-{model}" for model in MODELS]
    assert list(ended) == ["environment", *checks, "tests", "times"], printed
    assert {name for name, how in ended.items() if how != "ok"} == {"check-no_such_model"}, printed
    assert code == 1
    log = folder / "gpu-first.log"
    assert printed.splitlines()[-1] == (
        "check-no_such_model failed with exit code 2; "
        f"see the lines 'check-no_such_model: ' of {log}"
    )
    assert "invalid choice: 'no_such_model'" in log.read_text("utf-8")

    rows = [row for step in found["steps"] for row in step["rows"]]
    judged = {(row["model"], row["what"]): row["figure"] for row in rows if "what" in row}
    for dtype, largest in (("float32", 1e-4), ("bfloat16", 0.25)):
        error = judged["dat_nano", f"{dtype}, plain torch: largest error of the logits"]
        assert 0 <= error < largest
    for what in ("whole buckets", "padding", "two batches in flight"):
        assert judged["dat_nano", f"graph and eager, {what}: probabilities"] < 1e-5
    shares = {what: one for (model, what), one in judged.items() if model == "mask_rcnn_dat_nano"}
    assert [one for what, one in shares.items() if what.startswith("float32")] == [1] * 6
    assert sum(what.startswith("bfloat16") for what in shares) == 6
    timed = {row["way"]: row for row in rows if "way" in row}
    assert {"graph, kernels", "engine", "engine, overlapping", "eager", "graph"} <= set(timed)
    assert all(row["ms"] > 0 and row["images_per_s"] > 0 for row in timed.values())
    assert found["machine"]["command"] == "bash bench/gpu.sh first"
    assert {"commit", "date", "torch", "triton", "driver"} <= found["machine"].keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_part_leaves_a_result_of_every_step(
    rehearsed: dict[str, tuple[Path, str, int]],
) -> None:
    folder, printed, code = rehearsed["second"]
    found = results(folder, "second")
    ended = {step["name"]: step["ended"] for step in found["steps"]}
    assert ended == dict.fromkeys(
        ("environment", "server", "kernels", "detectors", "hottest", "compile"), "ok"
    ), printed
    assert code == 0
    rows = {step["name"]: step["rows"] for step in found["steps"]}
    assert [row["way"] for row in rows["compile"]] == ["graph, compiled kernels"]
    assert (
        len(rows["kernels"])
        == len(json.loads((folder / "kernels-cpu-float32.json").read_text())["steps"])
        > 0
    )
    assert {row["way"] for row in rows["detectors"] if "way" in row} == {
        "engine",
        "engine, overlapping",
    }
    assert rows["hottest"][0]["share"] >= rows["hottest"][-1]["share"] > 0
    assert "Self CPU" in (folder / "gpu-profile.txt").read_text("utf-8")
    server = json.loads((folder / "server-dat_nano-cpu.json").read_text("utf-8"))
    assert {row["protocol"] for row in server["closed_loop"]} == {"http", "grpc"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["first", "second"])
def test_what_comes_back_is_few_files_and_a_table(
    rehearsed: dict[str, tuple[Path, str, int]], part: str
) -> None:
    folder, _, _ = rehearsed[part]
    assert len(list(folder.iterdir())) <= 8
    table = tables(results(folder, part))
    for row in (row for step in results(folder, part)["steps"] for row in step["rows"]):
        assert row.get("what", row.get("way", row.get("kernel", ""))) in table
    assert not [line for line in table.splitlines() if line.count("|") == 1]


def test_an_unknown_step_is_an_error(tmp_path: Path) -> None:
    process = start("second", tmp_path, "kernel")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no step is called kernel; there are environment, server, kernels, " in printed
    assert not list(tmp_path.iterdir())


class Parsed(Exception):
    """A command line was understood."""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_understands_its_options(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse_args = ArgumentParser.parse_args

    def understood(parser: ArgumentParser) -> None:
        parse_args(parser)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", understood)
    steps = [step for group in (*first(device, CHECKED[device]), *second(device)) for step in group]
    ours = [step for step in steps if step.name != "tests"]
    assert len(ours) == len(CHECKED[device]) + 8
    for step in ours:
        _, _, module, *words = step.command
        monkeypatch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Parsed):
            import_module(module).main()
