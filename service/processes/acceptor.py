"""Who gets the next HTTP connection: the front end with the fewest.

Where several processes wait at one socket, whoever is faster takes what comes, and where each has a
socket of its own (SO_REUSEPORT) chance decides: of eight connections one front end may get six.
Here the supervisor accepts and hands over. While no front end is there, connections wait.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from service.processes.channel import Line
from service.processes.messages import NewConnection

_AT_ONCE = 64
_PAUSE_S = 0.01


class Door(NamedTuple):
    """A front end that takes connections.

    Attributes:
        line: to it.
        open: connections that it has.
        handed: to be called when it was handed one more.
    """

    line: Line
    open: int
    handed: Callable[[], None]


class Acceptor:
    """Accepts connections and hands them over.

    Args:
        listener: the socket; it is not closed.
        doors: the front ends that take connections now.
    """

    def __init__(self, listener: socket.socket, doors: Callable[[], Sequence[Door]]) -> None:
        self._listener = listener
        self._doors = doors
        self._held: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listener)
        if self._waiting is not None:
            self._waiting.cancel()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._held:
                try:
                    connection, _ = self._listener.accept()
                except BlockingIOError:
                    return
                except OSError:  # it was aborted, or there are no more descriptors for a while
                    self._pause()
                    return
                self._held.append(connection)
            if not self._hand_over(self._held[0]):
                self._pause()
                return
            self._held.pop().close()

    def _hand_over(self, connection: socket.socket) -> bool:
        for door in sorted(self._doors(), key=lambda door: door.open):
            if door.line.send(NewConnection(), [connection.fileno()]):
                door.handed()
                return True
        return False

    def _pause(self) -> None:
        """Wait a little for a front end."""
        self._loop.remove_reader(self._listener)
        self._waiting = self._loop.call_later(_PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._loop.add_reader(self._listener, self._accept)
        self._accept()
