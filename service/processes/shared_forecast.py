"""What the batches of the workers have shown, as everybody can read it on the board."""

from math import inf
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from service.batching.forecast import Batches, Expected, Forecast
from service.processes.board import BATCH_SIZES, Board

_FRESH_S = 0.01  # a batch or two


class PublishedForecast(Forecast):
    """The forecast of a worker.

    Args:
        board: of the server.
        worker: its index.
        model: index of the model.
    """

    def __init__(self, board: Board, worker: int, model: int) -> None:
        super().__init__()
        self._cells: NDArray[np.float64] = board.batches[worker, model]

    @override
    def batch_began(self) -> None:
        super().batch_began()
        self._cells[0] = self.batches.began_at

    @override
    def batch_ended(self, size: int, compute_s: float, spacing_s: float, *, crowded: bool) -> None:
        super().batch_ended(size, compute_s, spacing_s, crowded=crowded)
        batches = self.batches
        # The largest are those that a crowd fills.
        sizes = sorted(batches.compute_s, reverse=True)[:BATCH_SIZES]
        self._cells[1:4] = batches.usual, batches.stretch, len(sizes)
        for index, one in enumerate(sizes):
            self._cells[4 + 2 * index : 6 + 2 * index] = one, batches.compute_s[one]


class SharedForecast(Forecast):
    """A forecast by the batches of all workers, and the callers of one front end.

    Args:
        board: of the server.
        model: index of the model.
    """

    def __init__(self, board: Board, model: int) -> None:
        super().__init__()
        self._board = board
        self._model = model
        self._read_at = -inf

    @override
    def expect(self, waiting: int, running: int, decode_s: float = 0.0) -> Expected:
        now = monotonic()
        if now - self._read_at > _FRESH_S:
            self.batches, self._read_at = self._read(), now
        return super().expect(waiting, running, decode_s)

    def _read(self) -> Batches:
        """What the workers that can run the model have shown together."""
        able = self._board.able(self._model)
        shown = [cells for cells in self._board.batches[able, self._model] if cells[3]]
        batches = Batches(began_at=inf)
        for began_at, usual, stretch, count, *times in shown:
            batches.began_at = min(batches.began_at, began_at)
            batches.usual += usual / len(shown)
            # Batches of several devices end in turn.
            batches.stretch += stretch / len(shown) ** 2
            for index in range(int(count)):
                size, seconds = int(times[2 * index]), times[2 * index + 1]
                known = batches.compute_s.get(size)
                batches.compute_s[size] = seconds if known is None else (known + seconds) / 2
        return batches
