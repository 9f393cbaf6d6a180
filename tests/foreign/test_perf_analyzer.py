"""perf_analyzer of NVIDIA, with the statistics of the server in its report."""

import re
from pathlib import Path

import pytest

from bench.perf_analyzer import element, perf_analyzer, write_inputs
from tests.foreign.conftest import Ours
from tests.foreign.tensors import MODEL, small_pixels
from tests.server import RunningServer

pytestmark = pytest.mark.slow

REQUESTS = 40


def address(server: RunningServer, protocol: str) -> str:
    return server.http_url.removeprefix("http://") if protocol == "http" else server.grpc_target


def figure(printed: str, label: str) -> int:
    (found,) = re.findall(rf"{label}: (\d+)", printed)
    return int(found)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("options", [("--sync",), ("--async",), ("-b", 4)], ids=str)
def test_files(
    server: RunningServer, ours: Ours, tmp_path: Path, protocol: str, options: tuple[str, ...]
) -> None:
    inputs = tmp_path / "inputs.json"
    write_inputs(inputs, "image", [element(jpeg) for jpeg in ours.jpegs], [1])
    target = address(server, protocol)
    perf = perf_analyzer(
        protocol,
        target,
        MODEL,
        *("--input-data", inputs, "--request-count", REQUESTS, "--concurrency-range", 4),
        *options,
    )
    assert figure(perf.printed, "Request count") == REQUESTS
    batch = int(options[1]) if options[0] == "-b" else 1
    # The last answers may come after the statistics were asked for.
    counted = figure(perf.printed, "Inference count")
    assert 0.8 * REQUESTS * batch <= counted <= 1.2 * REQUESTS * batch
    assert 0 < figure(perf.printed, "Execution count") <= counted
    assert perf.requests_per_s > 0


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_pixels(server: RunningServer, tmp_path: Path, protocol: str) -> None:
    inputs, array = tmp_path / "inputs.json", small_pixels(3)
    write_inputs(inputs, "pixels", [one.tobytes() for one in array], array.shape[1:])
    perf = perf_analyzer(
        protocol,
        address(server, protocol),
        MODEL,
        *("--input-data", inputs, "--request-count", REQUESTS, "--concurrency-range", 4),
    )
    assert figure(perf.printed, "Request count") == REQUESTS


def test_a_stream(server: RunningServer, ours: Ours, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.json"
    write_inputs(inputs, "image", [element(jpeg) for jpeg in ours.jpegs], [1])
    perf = perf_analyzer(
        "grpc",
        server.grpc_target,
        MODEL,
        *("--input-data", inputs, "--request-count", REQUESTS, "--streaming", "--async"),
    )
    assert figure(perf.printed, "Request count") == REQUESTS
