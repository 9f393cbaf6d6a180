"""Whether the event loop of each process turns."""

import asyncio

from service.processes.board import Board

_PERIOD_S = 0.25


async def beat(board: Board, cell: int) -> None:
    """Show on the board that the event loop of this process turns; for ever."""
    while True:
        board.beats[cell] += 1
        await asyncio.sleep(_PERIOD_S)


class Pulse:
    """Looks whether a process still beats; to be asked again and again.

    Time is added up from look to look, so that a machine that was stopped for a while is not
    taken for a process that hangs.

    Args:
        board: of the server.
        cell: of the process.

    Attributes:
        still_s: how long the process had not beaten at the last look, seconds.
    """

    def __init__(self, board: Board, cell: int) -> None:
        self._board = board
        self._cell = cell
        self._start = self._seen = int(board.beats[cell])
        self.still_s = 0.0

    def look(self, step_s: float) -> float:
        """How long the process has not beaten, seconds; 0 before its first beat.

        Args:
            step_s: since the last look, as far as it counts.
        """
        beats = int(self._board.beats[self._cell])
        still = beats == self._seen and beats != self._start
        self.still_s = self.still_s + step_s if still else 0.0
        self._seen = beats
        return self.still_s
