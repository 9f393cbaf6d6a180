"""The lock of an admission, between two processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from service.processes.board import Board, Extent, SharedPlaces
from tests.server import ROOT

HOLD = """
import fcntl, sys, time
descriptor, seconds = int(sys.argv[1]), float(sys.argv[2])
fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, 0)
print("held", flush=True)
time.sleep(seconds)
"""


@contextmanager
def held(board: Board, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process has the lock for so long."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(board.descriptor), str(seconds)],
        cwd=ROOT,
        pass_fds=[board.descriptor],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board.create(Extent(1, 1, 1))
    board.alive[0] = 1
    yield board
    os.close(board.descriptor)


def test_a_process_that_has_no_core_for_a_moment_is_waited_for(board):
    places = SharedPlaces(board, 0, 0, 4)
    with held(board, 0.01):
        assert places.take(1, "high")


def test_a_process_that_is_stopped_stops_no_other(board):
    places = SharedPlaces(board, 0, 0, 4)
    with held(board, 100) as process:
        process.send_signal(signal.SIGSTOP)
        assert not places.take(1, "high")
        process.kill()
        process.wait()
        assert places.take(1, "high")
