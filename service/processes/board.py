"""What all processes of a server know of each other, in memory that they share.

Every cell has one writer, and counts upwards where others depend on it, so that nothing needs a
lock but the admission of a request: that reads what all front ends hold and writes what one of them
takes (`SharedPlaces`). Nothing stays behind: the memory has no name, and the lock of a process
that dies is released by the system.
"""

import fcntl
import mmap
import os
from contextlib import suppress
from enum import IntEnum
from math import prod
from time import sleep
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.batching.admission import Count
from service.priority import Priority

# Who holds the lock may be waiting for a core; but a process that is stopped in the middle of an
# admission must not stop the others. So they try again at once, and then for 60 ms.
_AT_ONCE, _TRIES, _PAUSE_S = 50, 300, 0.0002
_CLASSES = 2
# Sizes of batches whose times are shown, with figures of all batches.
BATCH_SIZES = 32
_BATCHES = 4 + 2 * BATCH_SIZES


class WorkerState(IntEnum):
    """What a worker is doing."""

    STARTING = 0
    READY = 1
    DOWN = 2


_READY = WorkerState.READY.value  # to look it up there takes a microsecond


class Extent(NamedTuple):
    """How many there are of each.

    Attributes:
        rows: places for front ends on the board; each has two, for itself and its successor.
        workers: one for each device.
        models: places for versions of models, see `rollout`.
    """

    rows: int
    workers: int
    models: int


class Board:
    """The shared memory as arrays.

    Args:
        descriptor: of the memory.
        extent: of the arrays.

    Attributes:
        looping: `(1,)`, whether processes die again and again; by the supervisor.
        alive: `(rows,)`, whether a front end has the row; by the supervisor.
        beats: `(rows + workers,)`, counts as long as the event loop of the process turns.
        balance: `(rows,)`, HTTP connections that the front end has, less those that it got so far.
        state: `(workers,)`, a `WorkerState`; READY by the worker, else by the supervisor.
        back_at: `(workers,)`, when a worker that is down should be ready again; monotonic seconds.
        admitted: `(rows, models, 2)`, places that the front end took, for requests of the upper
            and of the lower class.
        returned: `(rows, models, 2)`, places that it gave back itself.
        taken: `(rows, models, workers, 2)`, places that the worker gave back as the items left
            for its device.
        sent: `(rows, workers)`, items that the front end sent to the worker.
        done: `(rows, workers)`, items that the worker answered.
        serving: `(workers, models)`, whether the worker can run the model.
        running: `(workers, models)`, items on the device.
        batches: `(workers, models, cells)`, what batches have shown (`shared_forecast`).

    A model here is a version of one, by its place.
    """

    def __init__(self, descriptor: int, extent: Extent) -> None:
        self.descriptor = descriptor
        self.extent = extent
        rows, workers, models = extent
        self._memory = mmap.mmap(descriptor, _size(extent))
        self._end = 0
        self.looping = self._cells(1)
        self.alive = self._cells(rows)
        self.beats = self._cells(rows + workers)
        self.balance = self._cells(rows)
        self.state = self._cells(workers)
        self.admitted = self._cells(rows, models, _CLASSES)
        self.returned = self._cells(rows, models, _CLASSES)
        self.taken = self._cells(rows, models, workers, _CLASSES)
        self.sent = self._cells(rows, workers)
        self.done = self._cells(rows, workers)
        self.serving = self._cells(workers, models)
        self.running = self._cells(workers, models)
        self.back_at: NDArray[np.float64] = self._cells(workers).view(np.float64)
        batches = self._cells(workers, models, _BATCHES)
        self.batches: NDArray[np.float64] = batches.view(np.float64)

    @classmethod
    def create(cls, extent: Extent) -> "Board":
        """A board whose cells are all 0."""
        descriptor = os.memfd_create("dat-serve-board")
        os.ftruncate(descriptor, _size(extent))
        return cls(descriptor, extent)

    def _cells(self, *shape: int) -> NDArray[np.int64]:
        start, self._end = self._end, self._end + 8 * prod(shape)
        return np.frombuffer(self._memory, np.int64, prod(shape), start).reshape(shape)

    def count(self, model: int) -> Count:
        """Places in the queue of a model that all front ends hold, and its items on devices."""
        places = self.admitted[:, model] - self.returned[:, model]
        places -= self.taken[:, model].sum(1)
        high, low = (self.alive @ places).tolist()
        return Count(high + low, low, int(self.running[:, model].sum()))

    def loads(self) -> NDArray[np.int64]:
        """Items that each worker was sent and did not answer, `(workers,)`."""
        unanswered: NDArray[np.int64] = self.alive @ (self.sent - self.done)
        return unanswered

    def able(self, model: int) -> NDArray[np.bool_]:
        """Which workers can run a model now, `(workers,)`."""
        able: NDArray[np.bool_] = (self.state == _READY) & (self.serving[:, model] != 0)
        return able

    def status(self) -> bytes:
        """What `able` depends on, to see cheaply whether it has changed."""
        return bytes(self.state.tobytes() + self.serving.tobytes())

    def enter(self, row: int) -> None:
        """Give a row to a new front end."""
        of_row = (self.balance, self.admitted, self.returned, self.taken, self.sent, self.done)
        for cells in of_row:
            cells[row] = 0
        self.alive[row] = 1

    def clear(self, model: int) -> None:
        """Empty a place for another version; nobody has anything of the one before."""
        of_rows = (self.admitted, self.returned, self.taken)
        of_workers = (self.serving, self.running, self.batches)
        for cells in (*of_rows, *of_workers):
            cells[:, model] = 0


def _size(extent: Extent) -> int:
    rows, workers, models = extent
    of_rows = rows * (3 + _CLASSES * models * (2 + workers) + 2 * workers)
    of_workers = workers * (3 + (2 + _BATCHES) * models)
    return 8 * (1 + of_rows + of_workers)


def class_of(priority: Priority) -> int:
    """Where on the board a class of requests is counted."""
    return 0 if priority == "high" else 1


class SharedPlaces:
    """The places in the queue of a model that all front ends share; those of one front end.

    Args:
        board: of the server.
        row: of this front end.
        model: its index.
        limit: most places that are given out at a time, to all front ends together.
    """

    def __init__(self, board: Board, row: int, model: int, limit: int) -> None:
        self.limit = limit
        self._board = board
        self._row = row
        self._model = model

    def count(self) -> Count:
        """What all front ends hold, and what runs on all devices."""
        return self._board.count(self._model)

    def take(self, places: int, priority: Priority) -> bool:
        """Give out places, all or none, and say whether they were free."""
        with _Lock(self._board.descriptor, self._model) as locked:
            if not locked or not self.count().fits(places, priority, self.limit):
                return False
            self._board.admitted[self._row, self._model, class_of(priority)] += places
            return True

    def give_back(self, places: int, priority: Priority) -> None:
        """Take places back."""
        self._board.returned[self._row, self._model, class_of(priority)] += places

    def changed_running(self, items: int) -> None:
        """Nothing: the workers count these."""


class WorkerPlaces:
    """What the queue of a worker counts; its items hold places of the front ends.

    Args:
        board: of the server.
        worker: its index.
        model: its index.
    """

    limit = 0

    def __init__(self, board: Board, worker: int, model: int) -> None:
        self._running = board.running[worker, model : model + 1]
        self._board = board
        self._model = model

    def count(self) -> Count:
        """What all front ends hold: a crowd is a crowd of all workers."""
        return self._board.count(self._model)

    def take(self, places: int, priority: Priority) -> bool:
        """No place is given out by a worker."""
        raise NotImplementedError

    def give_back(self, places: int, priority: Priority) -> None:
        """No place is given out by a worker."""
        raise NotImplementedError

    def changed_running(self, items: int) -> None:
        """Count items that went to the device, or with a negative number came back."""
        self._running[0] += items


class _Lock:
    """A lock that the system releases when its process dies (fcntl(2), record locks)."""

    def __init__(self, descriptor: int, index: int) -> None:
        self._descriptor = descriptor
        self._index = index

    def __enter__(self) -> bool:
        for tries in range(_TRIES):
            with suppress(BlockingIOError):
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._index)
                return True
            if tries < _AT_ONCE:
                os.sched_yield()
            else:
                sleep(_PAUSE_S)
        return False

    def __exit__(self, *_: Any) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._index)
