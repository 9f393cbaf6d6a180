"""The README's commands, as a reader would paste them."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from bench.machine import RESULTS
from model import DAT, VARIANTS
from model.cost import cost
from service.errors import ServiceError, all_errors
from tests.server import ROOT

README = (ROOT / "README.md").read_text("utf-8")
CURL = [line[2:] for line in README.splitlines() if line.startswith("$ curl")]
(GRPC,) = re.findall(r"```python\n(import grpc\n.*?)```", README, re.DOTALL)


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", CURL)
def test_curl(server, command):
    here = command.replace("localhost:8000", server.http_url.removeprefix("http://"))
    answer = json.loads(run(["bash", "-c", here.replace("curl ", "curl -sS ", 1)]))
    assert all(result["status"] == "ok" for result in answer["results"])


def test_grpc(server):
    printed = run([sys.executable, "-c", GRPC.replace("localhost:8001", server.grpc_target)])
    assert "star" in printed


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.parametrize("error", list(all_errors()), ids=lambda e: e.__name__)
def test_every_error_is_in_the_table(error: type[ServiceError]):
    row = f"| `{error.code}` | {int(error.http_status)} | {error.grpc_code.name} | "
    assert row in README


def test_the_table_of_variants_says_what_the_modules_cost():
    rows = re.findall(r"`(dat_(?:pp_)?\w+_\d{3})` \| (\d+) \| ([\d.]+) M \| ([\d.]+) G", README)
    assert {name for name, *_ in rows} == {
        name for name in VARIANTS if name.endswith(("_224", "_384"))
    }
    for name, size, parameters, flops in rows:
        config = VARIANTS[name]
        assert config.image_size == (int(size), int(size))
        found = cost(DAT(config))
        assert f"{found.parameters / 1e6:.1f}" == parameters, name
        assert f"{found.flops / 1e9:.1f}" == flops, name


def figures(label: str) -> list[str]:
    """The cells that are not empty of the one row that begins with a label."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", README, re.MULTILINE)
    return [cell.strip() for cell in row.split("|") if cell.strip()]


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("index", [0, 1])
def test_the_figures_of_engines_are_those_of_the_results(index: int):
    name = ("dat_tiny_224", "dat_pp_tiny_224")[index]
    rows = {row["batch"]: row for row in result(f"engine-{name}-cpu-float32")["batches"]}
    (ov,) = [model for model in result("openvino-cpu")["models"] if model["model"] == name]
    openvino = {row["batch"]: row for row in ov["batches"]}
    for batch in (1, 8):
        row, end = rows[batch], f", batch {batch}"
        for label, figure in {
            "engine / straightforward eager implementation": f"{row['ratio']:.2f}",
            "the same, if that one were told to keep its memory": f"{row['ratio_to_keeping']:.2f}",
            "engine / a matrix product of 4096x4096, FLOPs a second": (
                f"{100 * row['share_of_product_rate']:.0f} %"
            ),
            "engine with OpenVINO / engine in torch": f"{openvino[batch]['ratio']:.2f}",
        }.items():
            assert figures(label + end)[index] == figure, label + end
    explained = f"{rows[8]['explained_over_plain_time']:.2f}"
    assert figures("time with points / without, batch 8")[index] == explained


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_figures_of_the_server_are_those_of_the_results(protocol: str):
    (row,) = [
        row
        for row in result("server-dat_tiny_224-cpu")["closed_loop"]
        if (row["protocol"], row["concurrency"]) == (protocol, 32)
    ]
    name = {"http": "HTTP", "grpc": "gRPC"}[protocol]
    label = f"server / its engine alone, 32 requests in flight, {name}"
    assert figures(label) == [f"{row['ratio']:.2f}"]


@pytest.mark.parametrize("index", [0, 1])
def test_the_figures_of_detectors_are_those_of_the_results(index: int):
    name = ("retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny")[index]
    (case,) = [
        case
        for case in result(f"detector-{name}-cpu-float32")["cases"]
        if case["upload"] == [800, 1333]
    ]
    (served,) = case["closed_loop"]
    for label, figure in {
        "forward pass, seconds": f"{case['forward_ms'] / 1000:.1f}",
        "post-processing / forward pass": f"{100 * case['post_processing_share']:.1f} %",
        "server / its engine alone, 2 requests in flight, HTTP": f"{served['ratio']:.2f}",
    }.items():
        assert figures(label)[index] == figure, label
