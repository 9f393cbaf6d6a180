"""Large answers of gRPC until their clients have taken them.

gRPC's servers in Python can end no call whose answer waits in flow control, so what is ended is
its connection, by its socket.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any, cast
from urllib.parse import unquote

import structlog

from service.transport.rpc.reading import Context
from service.transport.unread import LARGE_BYTES, UnreadAnswers

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Connection:
    """A connection, by the address of its client as gRPC writes it, `ipv4:127.0.0.1:50000`."""

    peer: str

    def has_taken_all(self) -> bool:
        """The end of each call is told, and nothing before that."""
        return False

    def cut_unread(self) -> None:
        """Shut the socket of the connection, of which gRPC then learns as from its client."""
        log.warning("connection cut", reason="unread", peer=self.peer)
        wanted = _address(*unquote(self.peer).partition(":")[2].rsplit(":", 1))
        for name in os.listdir("/proc/self/fd"):
            # A copy, so that it is the same connection that is looked at and shut.
            with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
                if (
                    connection.family in (socket.AF_INET, socket.AF_INET6)
                    and _address(*connection.getpeername()[:2]) == wanted
                ):
                    connection.shutdown(socket.SHUT_RDWR)


def until_done(unread: UnreadAnswers, context: Context, size: int) -> None:
    """Count the answer of a call, of so many bytes, until the call ends."""
    if size > LARGE_BYTES:
        connection = _Connection(context.peer())

        def done(_: Any) -> None:
            unread.remove(connection, size)

        context.add_done_callback(cast("Any", done))  # whose type gRPC keeps to itself
        unread.add(connection, size)


@contextmanager
def being_written(unread: UnreadAnswers, context: Context, size: int) -> Iterator[None]:
    """Count an answer of a stream, of so many bytes, while it is being written."""
    if size <= LARGE_BYTES:
        yield
        return
    connection = _Connection(context.peer())
    unread.add(connection, size)
    try:
        yield
    finally:
        unread.remove(connection, size)


def _address(host: str, port: str | int) -> tuple[object, int]:
    ip = ip_address(host.strip("[]").partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip, int(port)
