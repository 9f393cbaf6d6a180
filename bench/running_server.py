"""A real server in its own process, and the load generator in another."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RunningServer:
    """Where a started server listens."""

    pid: int
    ports: dict[str, int]

    def load(self, protocol: str, /, **options: object) -> Any:
        """Run the load generator in its own process and return its figures."""
        command = [sys.executable, "-m", "bench.load"]
        own = {"protocol": protocol, "port": self.ports[protocol], "server-pid": self.pid}
        for name, value in (own | options).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@contextmanager
def running_server(
    checkpoint: dict[str, Any] | None, source: Path | None = None, /, **settings: object
) -> Iterator[RunningServer]:
    """Start a server, wait until it is ready, and stop it at the end.

    Args:
        checkpoint: content of the file that it loads its weights from; `None` needs none.
        source: folder of the code; `None` means this one's.
        **settings: such as `DAT_MODEL__NAME="dat_tiny_224"`.

    Raises:
        RuntimeError: it did not become ready; its log is in the message.
    """
    ports = dict(zip(("http", "grpc", "metrics"), _free_ports(3), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        weights, log = Path(folder) / "weights.pth", Path(folder) / "server.log"
        chosen = {"DAT_SERVER__HOST": "127.0.0.1"}
        if checkpoint is not None:
            torch.save(checkpoint, weights)
            chosen["DAT_MODEL__CHECKPOINT"] = str(weights)
        environment = (
            os.environ
            | chosen
            | {f"DAT_SERVER__{name.upper()}_PORT": str(port) for name, port in ports.items()}
            | {name: str(value) for name, value in settings.items()}
        )
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "service"],
                cwd=source,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_until_ready(server, ports["http"], log)
            yield RunningServer(server.pid, ports)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()}")
