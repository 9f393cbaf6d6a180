"""The processes of a running server, to be killed, stopped and counted."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.processes.birth import Birth
from tests.server import RunningServer


def children(server: RunningServer) -> dict[str, int]:
    """Ids of the processes that the supervisor of a server started, by their names."""
    return {birth.name: pid for pid, birth in _births(server.process.pid)}


def everybody(server: RunningServer) -> list[int]:
    """Ids of all processes of a server, the one that was started first."""
    return [server.process.pid, *children(server).values()]


def kill(server: RunningServer, name: str) -> int:
    """SIGKILL to a child, by its name, and its id."""
    pid = children(server)[name]
    os.kill(pid, signal.SIGKILL)
    return pid


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing meanwhile (SIGSTOP)."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return _field(pid, 0) != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def resident_bytes(pid: int) -> int:
    """Memory of a process that no other process has, bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [line for line in lines if line.startswith("Private_")]
    return sum(1024 * int(line.split()[1]) for line in private)


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    """How many threads a process has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def _births(parent: int) -> Iterator[tuple[int, Birth]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            pid = int(folder.name)
            if int(_field(pid, 1)) != parent or not is_alive(pid):
                continue
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if "child" in words:  # there are none while a process begins, and when it has ended
                yield pid, Birth.read(words[-2])


def _field(pid: int, number: int) -> str:
    """A field of proc_pid_stat(5) behind the name of the process, which may have spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[number]
