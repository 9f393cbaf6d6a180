"""A real server in its own process, for tests to talk to."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class RunningServer:
    """Where a server listens, and its process."""

    http_url: str
    grpc_target: str
    metrics_url: str
    process: subprocess.Popen[str]
    log: "Queue[dict[str, Any] | None]"

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def wait_for_event(self, event: str) -> dict[str, Any]:
        """Return the next log line of that event."""
        while line := self.log.get(timeout=START_TIMEOUT_S):
            if line["event"] == event:
                return line
        raise AssertionError(f"the server ended before {event!r}")

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name with its labels as in the text format."""
        text = httpx.get(self.metrics_url).text
        return {
            sample.name
            + "".join(f",{k}={v}" for k, v in sorted(sample.labels.items()) if k != "version"): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@contextmanager
def start_server(
    program: Sequence[object] = ("service",), **settings: object
) -> Iterator[RunningServer]:
    """Start a server with settings such as `DAT_BATCHING__MAX_BATCH=1`, and wait for it.

    Args:
        program: a module that is a server, with its arguments.
        settings: from the environment.
    """
    with running([sys.executable, "-m", *program], environment(settings), ROOT) as server:
        yield server


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Variables of this process, with no settings but these."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
    return inherited | {name: str(value) for name, value in settings.items()}


@contextmanager
def running(
    command: Sequence[object], environment: Mapping[str, str], folder: Path
) -> Iterator[RunningServer]:
    """Run a server, and wait for it.

    Args:
        command: that starts it.
        environment: its variables; free ports of this machine are added where it names none.
        folder: in which it runs.
    """
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=folder,
        env={
            "DAT_SERVER__HOST": "127.0.0.1",
            "DAT_SERVER__HTTP_PORT": "0",
            "DAT_SERVER__GRPC_PORT": "0",
            "DAT_SERVER__METRICS_PORT": "0",
            "DAT_LOG__FORMAT": "json",
            **environment,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    log: Queue[dict[str, Any] | None] = Queue()
    reader = Thread(target=_read_log, args=(process, log))
    reader.start()
    try:
        while (line := log.get(timeout=START_TIMEOUT_S)) and line["event"] != "ready":
            pass
        assert line, f"the server did not start; it ended with {process.wait()}"
        address = "127.0.0.1"
        yield RunningServer(
            f"http://{address}:{line['http_port']}",
            f"{address}:{line['grpc_port']}",
            f"http://{address}:{line['metrics_port']}/metrics",
            process,
            log,
        )
    finally:
        process.kill()
        process.wait()
        reader.join()


def _read_log(process: "subprocess.Popen[str]", log: "Queue[dict[str, Any] | None]") -> None:
    assert process.stdout
    with process.stdout as lines:
        for line in lines:
            log.put(json.loads(line))
    log.put(None)
