"""What a child process is given when it is started."""

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Self

from service.processes.board import Board, Extent

Kind = Literal["front-end", "worker"]
# How a child is started; the id of the supervisor and the text of its birth follow.
COMMAND: tuple[str, ...] = (sys.executable, "-m", "service", "child")
_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class Birth:
    """What a child is, and the descriptors that it inherits.

    Attributes:
        kind: of the process.
        index: among those of its kind.
        row: of a front end on the board.
        board: descriptor of the board.
        extent: of the board.
        line: descriptor of the line to the supervisor.
        arena: of a front end: descriptor of its memory.
        grpc: of a front end: the port.
        front_ends: how many there are.
    """

    kind: Kind
    index: int
    board: int
    extent: Sequence[int]
    line: int
    row: int = -1
    arena: int = -1
    grpc: int = 0
    front_ends: int = 1

    @property
    def name(self) -> str:
        """As it is logged and counted."""
        return f"{self.kind}-{self.index}"

    @property
    def descriptors(self) -> list[int]:
        """All that are inherited."""
        return [one for one in (self.board, self.line, self.arena) if one >= 0]

    def text(self) -> str:
        """For the command line of the child."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Self:
        """What a child was given."""
        return cls(**json.loads(text))

    def open_board(self) -> Board:
        """The board of the server."""
        return Board(self.board, Extent._make(self.extent))

    def open_line(self) -> socket.socket:
        """The socket of the line to the supervisor."""
        return socket.socket(fileno=self.line)


def end_with_parent(parent: int) -> None:
    """Have the system end this process when the supervisor ends, whatever it is doing.

    Args:
        parent: process id of the supervisor.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)
