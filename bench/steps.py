"""Processes under time limits, one after another or side by side, and what they print.

A line that is a JSON object is a result; what a process printed before it failed or was cut
counts. All else is for the log.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock, Thread
from time import monotonic
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent
GRACE_S = 5.0  # between asking a process to end and ending it


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: for the log and the results.
        limit_s: time after which it is ended, seconds.
        command: of the process.
        environment: variables that are its own.
    """

    name: str
    limit_s: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a step.

    Attributes:
        name: of the step.
        seconds: that it took.
        ended: `ok`, or what went wrong.
        rows: the JSON objects that it printed.
    """

    name: str
    seconds: float
    ended: str
    rows: list[dict[str, Any]]


class Part:
    """Runs the steps of a part and keeps what they say.

    Args:
        log: takes what they print, each line behind the name of its step.
        limit_s: of all steps together, seconds.
        folder: for the files that they write.
        patience: how many times as long as their limits say all may take.
    """

    def __init__(self, log: TextIO, limit_s: float, folder: Path, *, patience: float = 1.0) -> None:
        self._log = log
        self._environment = {"PYTHONUNBUFFERED": "1", "BENCH_RESULTS": str(folder)}
        self._lock = Lock()
        self._patience = patience
        self._end = monotonic() + patience * limit_s

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run steps side by side."""
        with ThreadPoolExecutor(max(1, len(steps))) as threads:
            return list(threads.map(self._run, steps))

    def _run(self, step: Step) -> Outcome:
        began = monotonic()
        limit_s = min(self._patience * step.limit_s, self._end - began)
        if limit_s <= 0:
            return Outcome(step.name, 0.0, "left out, its part has no time left", [])
        rows: list[dict[str, Any]] = []
        with subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **self._environment, **step.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        ) as process:
            reader = Thread(target=self._read, args=(step.name, process, rows), daemon=True)
            reader.start()
            ended = _end_of(process, limit_s)
            reader.join(GRACE_S)
        return Outcome(step.name, round(monotonic() - began, 1), ended, rows)

    def _read(self, name: str, process: subprocess.Popen[str], rows: list[dict[str, Any]]) -> None:
        assert process.stdout
        for line in process.stdout:
            with self._lock:
                self._log.write(f"{name}: {line}")
                self._log.flush()
            if line.startswith("{"):
                with suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))


def _end_of(process: subprocess.Popen[str], limit_s: float) -> str:
    """Wait for a process, end all of its group, and say how it ended."""
    try:
        code = process.wait(limit_s)
        ended = f"failed with exit code {code}" if code else "ok"
    except subprocess.TimeoutExpired:
        ended = f"cut after {limit_s:.0f} s"
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return ended
