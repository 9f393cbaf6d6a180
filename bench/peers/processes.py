"""All processes of a server: known by a variable of their environment, whoever began them."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

MARK = "PEER_MARK"
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def marked(mark: str) -> list[int]:
    """The processes that have the mark now."""
    wanted = f"{MARK}={mark}".encode()
    return [
        int(environment.parent.name)
        for environment in Path("/proc").glob("[0-9]*/environ")
        if wanted in _read(environment).split(b"\0")
    ]


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that processes used so far."""
    ticks = 0
    for stat in _each(pids, "stat"):
        fields = stat.rsplit(b")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pids: Iterable[int]) -> int:
    """Bytes of processes in memory; what several share counts once."""
    total = 0
    for rollup in _each(pids, "smaps_rollup"):
        line = next(line for line in rollup.splitlines() if line.startswith(b"Pss:"))
        total += 1024 * int(line.split()[1])
    return total


def end(mark: str, patience_s: float) -> None:
    """Kill what has the mark, after some time to end by itself."""
    until = time.monotonic() + patience_s
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _each(pids: Iterable[int], file: str) -> Iterator[bytes]:
    for pid in pids:
        if content := _read(Path(f"/proc/{pid}/{file}")):
            yield content


def _read(path: Path) -> bytes:
    """The content of a file of a process; none of one that has ended."""
    try:
        return path.read_bytes()
    except _GONE:
        return b""
