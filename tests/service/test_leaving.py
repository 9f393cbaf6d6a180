"""Signals before a server is there, and to the first process of a container."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server import ROOT, environment

# In a namespace of its own a process is number 1, as in a container.
FIRST = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")
_START_S = 60


def can_be_first() -> bool:
    try:
        return subprocess.run([*FIRST, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


AS = [
    pytest.param((), id="any"),
    pytest.param(
        FIRST,
        id="first",
        marks=pytest.mark.skipif(not can_be_first(), reason="no namespaces for this user"),
    ),
]


class Starting:
    """A server that is being started.

    Attributes:
        process: the server, or what runs it in a namespace.
    """

    def __init__(self, process: "subprocess.Popen[str]", *, inside: bool) -> None:
        self.process = process
        self._inside = inside

    def send(self, number: int) -> None:
        """Send it a signal."""
        subprocess.run(["kill", f"-{number}", str(self._number())], check=True)

    def wait_for_torch(self) -> None:
        """Wait until it imports torch, which takes a while, and before which it has its ports."""
        until = time.monotonic() + _START_S
        while "libtorch_cpu" not in Path(f"/proc/{self._number()}/maps").read_text("utf-8"):
            assert time.monotonic() < until
            time.sleep(0.01)

    def wait_for(self, event: str) -> None:
        """Wait for a line of the log."""
        assert self.process.stdout
        assert any(f" {event} " in f"{line.rstrip()} " for line in self.process.stdout), event

    def _number(self) -> int:
        own = self.process.pid
        if not self._inside:
            return own
        of_unshare = Path(f"/proc/{own}/task/{own}/children").read_text("utf-8").split()
        return int(of_unshare[0]) if of_unshare else own


@contextmanager
def starting(before: Sequence[str], **settings: str) -> Iterator[Starting]:
    ports = dict.fromkeys(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), "0")
    given = {f"DAT_SERVER__{name}": value for name, value in ports.items()}
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "service"],
        cwd=ROOT,
        env=environment(given | {"DAT_MODEL__NAME": "dat_nano"} | settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Starting(process, inside=bool(before))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("before", AS)
def test_sigterm_before_the_server_is_there_ends_it_in_order(before):
    """To the first process the kernel gives no signal that it does not handle."""
    with starting(before) as server:
        server.wait_for_torch()
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_sighup_before_the_server_is_there_has_the_models_looked_at():
    with starting(()) as server:
        server.wait_for_torch()
        server.send(signal.SIGHUP)
        server.wait_for("ready")
        server.wait_for("reloading")


@pytest.mark.parametrize("before", AS)
def test_a_second_sigterm_ends_the_process_at_once(before):
    with starting(before, DAT_SERVER__DRAIN_DELAY_S="60") as server:
        server.wait_for("ready")
        server.send(signal.SIGTERM)
        server.wait_for("draining")
        server.send(signal.SIGTERM)
        assert server.process.wait(30) in (-signal.SIGTERM, 128 + signal.SIGTERM)
