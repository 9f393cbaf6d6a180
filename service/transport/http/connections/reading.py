"""How is what comes over a connection read, and how much may surround the bodies?"""

import asyncio
import socket
import sys
from struct import unpack_from
from typing import NamedTuple

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import InvalidRequest, ServiceError
from service.transport.http.connections.deadlines import Deadlines, Phase
from service.transport.http.connections.head import check_growing_head

# Chunk extensions and trailers; beside them a chunk may be framed by this many bytes a byte.
MAX_FRAMING_BYTES = 16 * 1024
_FRAMING_PER_BYTE = 16
# Of `struct tcp_info` of Linux: the first byte is the state, of a connection that nobody has closed
# `TCP_ESTABLISHED`, and at this place stands `tcpi_last_data_recv`, milliseconds.
_ESTABLISHED, _LAST_DATA_RECEIVED, _TCP_INFO_BYTES = 1, 52, 56


class Reading:
    """Feeds the parser of a connection, and hands over what it finds of bodies.

    Args:
        protocol: the connection, which has the parser and is called by it. Made before its parser,
            which asks once where bodies go.
        deadlines: of the connection.
    """

    def __init__(self, protocol: HttpToolsProtocol, deadlines: Deadlines) -> None:
        self._protocol = protocol
        self._deadlines = deadlines
        # A list takes the pieces of a body at the least cost.
        self.pieces: list[bytes] = []
        protocol.on_body = self.pieces.append  # type: ignore[method-assign, assignment]
        self._head_bytes = 0  # of the one that is coming
        self._framing_bytes = 0  # of a body beside its content

    def read(self, data: memoryview) -> bool:
        """Read on; whether the data ended in a head that began in it.

        Raises:
            ServiceError: what came cannot be read, or is refused.
        """
        protocol, deadlines = self._protocol, self._deadlines
        before, started = deadlines.phase, protocol.scope
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            self.pieces.clear()
            raise _cause(error) from None
        delivered = self.deliver() if self.pieces else 0
        phase = deadlines.phase
        # How much of the data belongs to what is coming is known only if it has nothing else.
        waited = phase is before and protocol.scope is started
        if phase is Phase.HEAD or phase is Phase.IDLE:
            self._head_bytes = self._head_bytes + len(data) if waited else 0
            if phase is Phase.HEAD or waited:  # empty lines between requests count too
                check_growing_head(protocol.url, protocol.headers, self._head_bytes)
            return phase is Phase.HEAD and not waited
        if phase is Phase.BODY:
            deadlines.body_bytes += delivered
            framing = len(data) - _FRAMING_PER_BYTE * delivered
            self._framing_bytes = max(0, self._framing_bytes + framing) if waited else 0
            if self._framing_bytes > MAX_FRAMING_BYTES:
                raise InvalidRequest(
                    f"chunk extensions and trailers have more than {MAX_FRAMING_BYTES} bytes"
                )
        return False

    def deliver(self) -> int:
        """Give what was read of a body to its request; how many bytes that was."""
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        HttpToolsProtocol.on_body(self._protocol, body)
        return len(body)

    def _parse(self, rest: memoryview) -> None:
        protocol = self._protocol
        while True:
            try:
                protocol.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                taken = offer.args[0]
            else:
                return
            # The parser has read the head and would read no body. Another one is told the same
            # head without the offer, and reads on. Inside the `except` the offer would pass for
            # the cause of what this raises (`_cause`).
            head = self._head_without_offer()
            protocol.parser = httptools.HttpRequestParser(protocol)
            protocol.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            protocol.parser.feed_data(head)
            rest = rest[taken:]

    def _head_without_offer(self) -> bytes:
        protocol, parser = self._protocol, self._protocol.parser
        version = parser.get_http_version().encode()
        lines = [parser.get_method() + b" " + protocol.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in protocol.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])


def _cause(error: httptools.HttpParserError) -> ServiceError:
    """The failure behind an error of the parser, or behind what a callback raised in it."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
    if isinstance(cause, ServiceError):
        return cause
    if cause is not None:
        return InvalidRequest("the request's URL cannot be read")
    return InvalidRequest(f"this is not a request of HTTP/1.1: {error}")


class Waited(NamedTuple):
    """What became of a request until it was read.

    Attributes:
        left: whether its client has closed the connection, of which we are told behind its request.
            In a crowd that waits for no answer every connection is one of these by the time that
            it is read. To begin with its request, and be told then, would take all the time there
            is.
        seconds: since the newest of it came.
    """

    left: bool
    seconds: float


def waited(transport: asyncio.Transport) -> Waited:
    """What became of the request that is being read, as Linux knows; other systems do not tell."""
    if sys.platform != "linux":
        return Waited(left=False, seconds=0.0)
    connection = transport.get_extra_info("socket")
    known: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    (received_ms,) = unpack_from("I", known, _LAST_DATA_RECEIVED)
    return Waited(left=known[0] != _ESTABLISHED, seconds=received_ms / 1e3)
