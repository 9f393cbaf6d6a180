"""A connection between a front end and a worker: small messages, many in one write.

And the line between the supervisor and a child, which carries sockets and memory as well.
"""

import asyncio
import os
import pickle
import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

from typing_extensions import override

_LENGTH_BYTES = 4
_MOST_DESCRIPTORS = 4
_PACKET_BYTES = 1 << 16
_PACKETS_AT_ONCE = 64


class Channel(asyncio.Protocol):
    """One end of a stream of messages.

    What is sent in one turn of the event loop leaves in one write.

    Args:
        receive: takes each message.
        lost: is called when the other process ended.
    """

    def __init__(self, receive: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._receive = receive
        self._lost = lost
        self._outbox: list[Any] = []
        self._inbox = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, over: socket.socket, receive: Callable[[Any], None], lost: Callable[[], None]
    ) -> "Channel":
        """A channel over one end of a pair of sockets."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(receive, lost), sock=over)
        return channel

    def send(self, message: Any) -> None:
        """Send a message; what is sent to a process that ended is lost."""
        self._outbox.append(message)
        if len(self._outbox) == 1:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write what waits to be sent."""
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None and not self._transport.is_closing():
            frame = pickle.dumps(outbox, 5)
            self._transport.write(len(frame).to_bytes(_LENGTH_BYTES, "little") + frame)

    def close(self) -> None:
        """End the channel."""
        if self._transport is not None:
            self._transport.close()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._inbox += data
        start = 0
        while len(self._inbox) - start >= _LENGTH_BYTES:
            end = start + _LENGTH_BYTES
            end += int.from_bytes(self._inbox[start:end], "little")
            if len(self._inbox) < end:
                break
            frame = self._inbox[start + _LENGTH_BYTES : end]
            start = end
            for message in pickle.loads(frame):  # noqa: S301  # between our processes
                self._receive(message)
        del self._inbox[:start]

    @override
    def connection_lost(self, error: Exception | None) -> None:
        self._lost()


class Line:
    """One end of the line between the supervisor and a child.

    Every message is a packet, with descriptors that the system hands over with it.

    Args:
        over: a socket of packets (SOCK_SEQPACKET).
        receive: takes each message and its descriptors.
        lost: is called when the other process ended.
    """

    def __init__(
        self,
        over: socket.socket,
        receive: Callable[[Any, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        self._socket = over
        self._receive = receive
        self._lost = lost
        over.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(over, self._read)

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> bool:
        """Send a message, and say whether it could be: the other end may be full or gone.

        Args:
            message: to send.
            descriptors: handed over with it; they stay open here.
        """
        try:
            socket.send_fds(self._socket, [pickle.dumps(message, 5)], list(descriptors))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the line."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        for _ in range(_PACKETS_AT_ONCE):
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._socket, _PACKET_BYTES, _MOST_DESCRIPTORS
                )
            except BlockingIOError:
                return
            except OSError:
                packet, descriptors = b"", []
            if not packet:
                self.close()
                self._lost()
                return
            self._receive(pickle.loads(packet), list(descriptors))  # noqa: S301


def in_memory(content: Any) -> int:
    """A descriptor of memory that holds an object, to be sent with a message."""
    descriptor = os.memfd_create("dat-serve-message")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        pickle.dump(content, file, 5)
    return descriptor


def from_memory(descriptor: int) -> Any:
    """The object that `in_memory` put there; the descriptor is closed."""
    # All processes have one position in this file.
    data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    os.close(descriptor)
    return pickle.loads(data)  # noqa: S301  # between our processes


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def line_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a line."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
