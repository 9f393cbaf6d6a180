"""A real server in its own process, and the load generator in another."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RunningServer:
    """Where a started server listens."""

    pid: int
    ports: dict[str, int]

    def load(self, protocol: str, module: str = "bench.load", /, **options: object) -> Any:
        """Run a load generator (`bench.load` has its options) and return its figures."""
        command = [sys.executable, "-m", module]
        own = {"protocol": protocol, "port": self.ports[protocol], "server-pid": self.pid}
        for name, value in (own | options).items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@contextmanager
def running_server(
    checkpoint: dict[str, Any] | None = None, program: str = "service", /, **settings: object
) -> Iterator[RunningServer]:
    """Start a server, wait until it is ready, and stop it at the end.

    Args:
        checkpoint: content of the file that it loads its weights from; `None` needs none.
        program: module that is the server.
        **settings: such as `DAT_MODEL__NAME="dat_tiny_224"`.

    Raises:
        RuntimeError: it did not become ready; its log is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights, log = Path(folder) / "weights.pth", Path(folder) / "server.log"
        chosen = {"DAT_SERVER__HOST": "127.0.0.1", "DAT_LOG__FORMAT": "json"}
        chosen |= {f"DAT_SERVER__{name}_PORT": "0" for name in ("HTTP", "GRPC", "METRICS")}
        if checkpoint is not None:
            import torch  # noqa: PLC0415  # most servers bring their weights

            torch.save(checkpoint, weights)
            chosen["DAT_MODEL__CHECKPOINT"] = str(weights)
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", program],
                env=os.environ | chosen | {name: str(value) for name, value in settings.items()},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield RunningServer(server.pid, _ports(server, log))
        finally:
            server.terminate()
            server.wait(timeout=60)


def _ports(server: subprocess.Popen[bytes], log: Path) -> dict[str, int]:
    """The ports that a server names when it is ready."""
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("{") and '"event": "ready"' in line:
                ready = json.loads(line)
                return {name: ready[f"{name}_port"] for name in ("http", "grpc", "metrics")}
        time.sleep(0.2)
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()}")
