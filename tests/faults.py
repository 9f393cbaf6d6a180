"""Servers that fail, or wait, when a test says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.server import RunningServer, start_server

# What makes a server one process, or a supervisor with two front ends and a worker.
SHAPES: dict[str, dict[str, object]] = {"one": {}, "many": {"DAT_SERVER__FRONT_ENDS": 2}}


@dataclass(frozen=True)
class Faulty:
    """A server, and the folder whose files are its faults (see `tests.faulty_server`)."""

    server: RunningServer
    folder: Path

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        (self.folder / name).touch()
        try:
            yield
        finally:
            (self.folder / name).unlink()


@contextmanager
def faulty(folder: Path, **settings: object) -> Iterator[Faulty]:
    """Start a server of the demo classifier whose faults are the files of a folder."""
    chosen = {
        "DAT_MODEL__NAME": "dat_nano",
        "DAT_BATCHING__MAX_BATCH": 8,
        # Teams of threads wait for each other seconds long where other tests have their cores.
        "DAT_ENGINE__THREADS": 1,
        "DAT_ENGINE__HANG_TIMEOUT_S": 3,
        "DAT_SERVER__DRAIN_GRACE_S": 5,
    } | settings
    with start_server(("tests.faulty_server", folder), **chosen) as server:
        yield Faulty(server, folder)


@contextmanager
def one_by_one(folder: Path, **settings: object) -> Iterator[Faulty]:
    """Start a server that takes one image at a time; with the fault `wait`, as long as it is told.

    Its queue has eight places, and a request at most eight images.
    """
    with faulty(
        folder,
        DAT_BATCHING__MAX_BATCH=1,
        DAT_BATCHING__QUEUE_LIMIT=8,
        DAT_LIMITS__MAX_IMAGES=8,
        DAT_ENGINE__HANG_TIMEOUT_S=100,
        DAT_SERVER__DRAIN_GRACE_S=30,
        **settings,
    ) as running:
        yield running
