"""docs/protocols.md: what it shows of each client is run, and prints what it says."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from bench.environments import python_of
from bench.perf_analyzer import program, variables
from tests.server import ROOT, RunningServer

PAGE = (ROOT / "docs" / "protocols.md").read_text("utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
PRINTED = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
CONSOLE = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)
TRITON, KSERVE, INPUTS = CODE


def run(command: list[str], server: RunningServer, folder: Path, **more: str) -> str:
    """What a command of the page prints, asked of this server and with its files elsewhere."""
    for shown, here in {
        "localhost:8000": server.http_url.removeprefix("http://"),
        "localhost:8001": server.grpc_target,
        "inputs.json": str(folder / "inputs.json"),
        "> answer": f"> {folder / 'answer'}",
    }.items():
        command = [word.replace(shown, here) for word in command]
    environment = os.environ | {"NO_PROXY": "127.0.0.1"} | more
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rounded(printed: str) -> str:
    """Without the last digits of scores, which differ from machine to machine."""
    return re.sub(r"^(0\.\d{3})\d+", r"\1", printed, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("environment", "code", "printed"),
    [
        ("tritonclient", TRITON, PRINTED[0]),
        pytest.param("kserve", KSERVE, PRINTED[1], marks=pytest.mark.slow),
    ],
    ids=["tritonclient", "kserve"],
)
def test_a_python_client(
    server: RunningServer, tmp_path: Path, environment: str, code: str, printed: str
) -> None:
    found = run([str(python_of(environment)), "-c", code], server, tmp_path)
    assert rounded(found) == rounded(printed)


@pytest.mark.slow
def test_perf_analyzer(server: RunningServer, tmp_path: Path) -> None:
    run([str(python_of("tritonclient")), "-c", INPUTS], server, tmp_path)
    commands = [line for line in CONSOLE if line.startswith("perf_analyzer ")]
    assert ["-i http" in commands[0], "-i grpc" in commands[1]] == [True, True]
    path = f"{program().parent}:{os.environ['PATH']}"
    for command in commands:
        printed = run(["bash", "-c", command], server, tmp_path, PATH=path, **variables())
        assert "Request count: 200" in printed
        assert "Inference count: " in printed


def test_curl(server: RunningServer, tmp_path: Path) -> None:
    (in_json, as_it_is) = [line for line in CONSOLE if line.startswith("curl ")]
    answer = json.loads(run(["bash", "-c", in_json], server, tmp_path))
    (labels,) = answer["outputs"]
    assert labels["data"][0].endswith(":star")
    run(["bash", "-c", as_it_is], server, tmp_path)
    body = (tmp_path / "answer").read_bytes()
    head, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    sizes = [one["parameters"]["binary_data_size"] for one in head["outputs"]]
    assert len(body) == end + sum(sizes)
    assert body.count(b":star") == 1
