"""One server at a time, begun, asked and ended."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.environments import python_of
from bench.peers import processes
from bench.peers.load import HOST, jpegs
from bench.peers.sides import Predictions, Side
from service.process import ENVIRONMENT

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # of a probability
_START_S, _END_S = 120.0, 10.0
_SETTLE_S, _LOOK_S = 20.0, 0.5
_RESTING = 0.2  # of a core


class WrongAnswer(Exception):
    """A server said something else than ours."""


@dataclass(frozen=True)
class Running:
    """A server that has answered.

    Attributes:
        side: which one it is.
        port: of HTTP.
        mark: of its processes.
        start_s: from its beginning to its first answer, seconds.
    """

    side: Side
    port: int
    mark: str
    start_s: float

    def predictions(self, jpeg: bytes) -> Predictions:
        """The classes of an image."""
        name, _, value = self.side.header.partition(": ")
        headers = {"Content-Type": "image/jpeg", **({name: value} if name else {})}
        url = f"http://{HOST}:{self.port}{self.side.path}"
        request = urllib.request.Request(url, jpeg, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return self.side.predictions(answer.read())

    def load(self, concurrency: int, seconds: float, warmup: float) -> Any:
        """Run the load generator in its own process and return its figures, with the memory.

        Raises:
            RuntimeError: not one request was answered.
        """
        command = [sys.executable, "-m", "bench.peers.load"]
        own = {"port": self.port, "path": self.side.path, "mark": self.mark}
        window = {"concurrency": concurrency, "seconds": seconds, "warmup": warmup}
        for name, value in (own | window).items():
            command += [f"--{name}", str(value)]
        if self.side.header:
            command += ["--header", self.side.header]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout
        figures = json.loads(answer)
        if "200" not in figures["statuses"]:
            raise RuntimeError(f"{self.side.name} answers nothing: {figures['statuses']}")
        return figures | {
            "cpu_ms": 1e3 * figures["server_cpus"] / figures["requests_per_s"],
            "memory": processes.memory(processes.marked(self.mark)),
        }


@contextmanager
def running(side: Side, setting: Mapping[str, str], model: Mapping[str, str]) -> Iterator[Running]:
    """Begin a server and wait for its first answer; at the end nothing of it is left.

    Args:
        side: which one.
        setting: variables of its environment.
        model: likewise, which model it loads (`DAT_MODEL__...`).

    Raises:
        RuntimeError: it does not answer; its log is in the message.
    """
    python = Path(sys.executable) if side.environment is None else python_of(side.environment)
    mark, port = uuid.uuid4().hex, _free_port()
    with tempfile.TemporaryDirectory(prefix="peer") as folder:
        log = Path(folder) / "server.log"
        own = {
            name: value.format(port=port, folder=folder) for name, value in side.variables.items()
        }
        common = {"PYTHONPATH": str(ROOT), "TMPDIR": folder, processes.MARK: mark}
        with log.open("w") as output:
            began = time.perf_counter()
            server = subprocess.Popen(
                [python, *(argument.format(port=port) for argument in side.arguments)],
                cwd=folder,
                env={**os.environ, **ENVIRONMENT, **common, **model, **own, **setting},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            first = jpegs()[0]
            while True:
                waiting = Running(side, port, mark, time.perf_counter() - began)
                try:
                    waiting.predictions(first)
                    break
                except (urllib.error.URLError, OSError):
                    if server.poll() is not None or waiting.start_s > _START_S:
                        text = log.read_text(errors="replace")
                        raise RuntimeError(f"{side.name} does not answer:\n{text}") from None
                    time.sleep(0.05)
            answered = Running(side, port, mark, time.perf_counter() - began)
            _settle(mark)
            yield answered
        finally:
            server.terminate()
            processes.end(mark, _END_S)
            server.wait()


def check(found: Predictions, expected: Predictions) -> None:
    """Compare the classes of an image with those that ours gave.

    Raises:
        WrongAnswer: another best class, or other probabilities.
    """
    same = found[0]["label"] == expected[0]["label"] and all(
        abs(one["score"] - other["score"]) <= TOLERANCE
        for one, other in zip(found, expected, strict=True)
    )
    if not same:
        raise WrongAnswer(f"{found} instead of {expected}")


def _settle(mark: str) -> None:
    """Wait until a server rests: one of its processes may still load when another answers."""
    until = time.monotonic() + _SETTLE_S
    while time.monotonic() < until:
        pids = processes.marked(mark)
        before = processes.cpu_s(pids)
        time.sleep(_LOOK_S)
        if processes.cpu_s(pids) - before < _RESTING * _LOOK_S:
            return


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
