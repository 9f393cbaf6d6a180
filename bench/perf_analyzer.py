"""NVIDIA's `perf_analyzer`, the load generator of Triton: an independent client of our server.

It comes with the last `tritonclient` whose wheel runs on Debian 12 (`bench/pins`), and needs
`libb64-0d` of Debian.
"""

import base64
import csv
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.environments import python_of

TIMEOUT_S = 120


class Perf(NamedTuple):
    """What it measured.

    Attributes:
        requests_per_s: answered.
        p50_ms: of a request.
        p99_ms: likewise.
        printed: its report.
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    printed: str


def perf_analyzer(protocol: str, address: str, model: str, *options: object) -> Perf:
    """Run it at one concurrency.

    Args:
        protocol: `http` or `grpc`.
        address: of the server.
        model: that it asks.
        *options: of its command line.

    Raises:
        RuntimeError: it failed; what it printed is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        arguments = ["-m", model, "-u", address, "-i", protocol, "-f", report, *options]
        done = subprocess.run(
            [program(), *map(str, arguments)],
            check=False,
            env=os.environ | variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise RuntimeError(f"perf_analyzer ended with {done.returncode}:\n{done.stdout}")
        (row,) = csv.DictReader(report.read_text().splitlines())
    p50_ms, p99_ms = (float(row[f"p{rank} latency"]) / 1e3 for rank in (50, 99))
    return Perf(float(row["Inferences/Second"]), p50_ms, p99_ms, done.stdout)


def program() -> Path:
    """The program, which is installed where it is not."""
    return python_of("perf_analyzer").with_name("perf_analyzer")


def variables() -> dict[str, str]:
    """Variables of the environment that it needs."""
    (library,) = python_of("perf_analyzer").parents[1].rglob("libcudart.so.12")
    return {"LD_LIBRARY_PATH": str(library.parent)}


def write_inputs(path: Path, name: str, contents: Sequence[bytes], shape: Sequence[int]) -> None:
    """Write a file for `--input-data`, of which one content after the other is sent.

    Args:
        path: of the file.
        name: of the tensor.
        contents: its bytes as they are on the wire; see `element` for BYTES.
        shape: of each, without the axis of the batch.
    """
    data = [
        {name: {"content": {"b64": base64.b64encode(one).decode()}, "shape": list(shape)}}
        for one in contents
    ]
    path.write_text(json.dumps({"data": data}))


def element(content: bytes) -> bytes:
    """A tensor of BYTES with one element, as it is on the wire."""
    return struct.pack("<I", len(content)) + content
