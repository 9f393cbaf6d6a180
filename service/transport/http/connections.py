"""HTTP connections: what may come over one, in which time, and over how many.

uvicorn's protocol reads requests and runs the application. The one here adds what it leaves open:
limits on the head of a request and on what surrounds its body, on the time that a client may take
to send or to read, and on the number of connections; errors of the protocol in the form of all
others; and offers of an upgrade are passed over, where uvicorn would lose the body.
"""

import asyncio
import socket
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum
from ipaddress import AddressValueError, IPv6Address
from json import dumps
from math import inf
from re import compile as pattern
from typing import Any

import httptools
import structlog
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.errors import (
    Cancelled,
    HeadersTooLarge,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    ServiceError,
    TooManyConnections,
    UrlTooLong,
)
from service.metrics import Cut, Metrics, Port
from service.settings import Server
from service.transport import request_id as request_ids
from service.transport.http.error_forms import error_json, is_open_inference
from service.transport.http.schema import error_body, error_headers
from service.transport.unread import LARGE_BYTES, UnreadAnswers

log = structlog.get_logger(__name__)

MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024  # a name and its value; tokens of single sign-on take 8 KiB
MAX_HEADERS_BYTES = 64 * 1024
MAX_HEADERS = 100
# Chunk extensions and trailers; beside them a chunk may be framed by this many bytes a byte.
MAX_FRAMING_BYTES = 16 * 1024
_FRAMING_PER_BYTE = 16
MAX_PIPELINED = 64
_READ_AT_ONCE_BYTES = 64 * 1024  # what a client may send more than allowed before it is seen

MIN_BODY_BYTES_PER_S = 1024
# At the limit a connection gives way to a new one when its client has kept it waiting so long.
_MAY_BE_EVICTED_S = 1.0
_RESERVE_HEADER_TIMEOUT_S = 2.0
_ESTABLISHED = 1  # state of a connection that nobody has closed (`TCP_ESTABLISHED` of Linux)
_DRAINING_WRITE_TIMEOUT_S = 2.0
# After its last answer a connection goes on to read, or the client would lose the answer to the
# reset that unread bytes cause.
_LINGER_S = 2.0
_LONGEST_LOOK_S = 1.0

# Answers are for the caller alone and for no page to show: OWASP's headers for an API.
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
_ID_HEADER = request_ids.HEADER.encode()
_ANY_ID = "0" * 32
PROBES = (b"/health/", b"/v2/health/")
_HEAD = b"HTTP/1.1 "  # as the head of every answer begins
_HOST = pattern(rb"[A-Za-z0-9._~!$&'()*+,;=%-]*(:[0-9]{0,5})?")
_IPV6_HOST = pattern(rb"\[([0-9A-Fa-f:.]+)\](:[0-9]{0,5})?")


class _Phase(Enum):
    """What a connection has last read, and so what comes next."""

    HEAD = "the rest of a request's head, or the first one"
    BODY = "the rest of a request's body"
    WORK = "our answer"
    IDLE = "the next request"
    BROKEN = "our answer, before the end: the rest cannot be read"
    LINGER = "nothing: the last answer was given"


# Of a method, a URL and headers.
Gate = Callable[[bytes, bytes, Sequence[tuple[bytes, bytes]]], ServiceError | None]


def _let_pass(_method: bytes, _url: bytes, _headers: object) -> None:
    """Turn nobody away."""


class Connections(ServerState):
    """All connections to one port.

    Args:
        limits: in time.
        most: connections beside a few that only probes may use.
        reserve: how many those few are.
        port: as the metrics call it.
        metrics: count what became of connections.
        gate: why a request is turned away by its head alone, if it is.
        unread: bounds the large answers that clients have not taken.

    Attributes:
        draining: whether the server is leaving, so that stuck connections end soon.
    """

    connections: set["Connection"]  # type: ignore[assignment]

    def __init__(
        self,
        limits: Server,
        *,
        most: int,
        reserve: int,
        port: Port,
        metrics: Metrics,
        gate: Gate = _let_pass,
        unread: UnreadAnswers | None = None,
    ) -> None:
        super().__init__()
        self.unread = UnreadAnswers(inf) if unread is None else unread
        self.limits = limits
        self.draining = False
        self.opened = metrics.connections[port]
        self._cut = metrics.connections_cut[port]
        self.gate = gate
        self._most = most
        self._reserve = reserve
        self._port = port
        self._responses = metrics.responses
        self._answered: dict[int, Counter] = {}
        self._last_said = _Said(InvalidRequest(""), open_inference=False)
        # Those that wait for their client, longest first, and since when in loop time.
        self.waiting: OrderedDict[Connection, float] = OrderedDict()
        self.reserved: OrderedDict[Connection, None] = OrderedDict()

    def admit(self, connection: "Connection", now: float) -> bool:
        """Make room for a new connection; whether there was some, or it is one of the reserve."""
        if len(self.connections) <= self._most:
            return True
        if self.waiting:
            longest, since = next(iter(self.waiting.items()))
            if now - since >= _MAY_BE_EVICTED_S:
                self.cut(longest, "evicted")
                return True
        self.reserved[connection] = None
        if len(self.reserved) > self._reserve:
            self.cut(next(iter(self.reserved)), "crowded")
        return False

    def cut(self, connection: "Connection", reason: Cut) -> None:
        """End a connection at once."""
        self.count_cut(reason)
        self.forget(connection)
        connection.transport.abort()

    def count_cut(self, reason: Cut) -> None:
        """Count a connection that the server ends because of its client."""
        self._cut[reason].inc()

    def count_response(self, status: int) -> None:
        """Count an answer that the application does not see."""
        if status not in self._answered:
            self._answered[status] = self._responses.labels(self._port, str(status))
        self._answered[status].inc()

    def said(self, error: ServiceError, *, open_inference: bool) -> "_Said":
        """The answer to an error, kept because a whole crowd may get the same."""
        last = self._last_said
        if last.error is not error or last.open_inference is not open_inference:
            last = self._last_said = _Said(error, open_inference=open_inference)
        return last

    def forget(self, connection: "Connection") -> None:
        """Keep no place for a connection that ends."""
        self.waiting.pop(connection, None)
        self.reserved.pop(connection, None)
        self.unread.forget(connection)

    async def watch(self) -> None:
        """Look after the time of all connections, until cancelled."""
        limits, loop = self.limits, asyncio.get_running_loop()
        shortest = min(
            limits.header_timeout_s,
            limits.body_timeout_s,
            limits.write_timeout_s,
            limits.keep_alive_s,
        )
        while True:
            await asyncio.sleep(min(_LONGEST_LOOK_S, shortest / 4))
            # What came while the loop was busy is read first: no client is slow because we are.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            now = loop.time()
            for connection in list(self.connections):
                connection.check(now)


class Connection(HttpToolsProtocol):
    """One connection; what is public here is called by asyncio, httptools or uvicorn."""

    server_state: Connections

    def __init__(
        self,
        config: Config,
        server_state: Connections,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        # The parser asks for it once: a list takes the pieces of a body at the least cost.
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # type: ignore[method-assign, assignment]
        super().__init__(config, server_state, app_state, _loop)
        self.url = b""  # until a request begins, before which there may be an error
        self._limits = server_state.limits
        self._phase = _Phase.HEAD
        self._deadline = 0.0  # of the phase, loop time
        self._reserved = False
        self._running: Any = None  # uvicorn's cycle of the request that is being answered
        self._exchange: _Exchange
        self._answers: _Answers
        self._last_word: ServiceError | None = None
        self._head_bytes = 0  # of the one that is coming
        self._framing_bytes = 0  # of a body beside its content
        self._body_bytes = 0  # since its time began anew
        self._unsent = 0  # bytes of answers, when last looked
        self._taken_at = 0.0  # when the client last took something of them, loop time

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find a place for the connection, and wait for its first request."""
        super().connection_made(transport)
        self._answer_over(transport)
        self.server_state.opened.inc()
        now = self.loop.time()
        self._reserved = not self.server_state.admit(self, now)
        self._wait(_Phase.HEAD, now)

    def _answer_over(self, transport: asyncio.Transport) -> None:
        self._answers = _Answers(transport, self._write, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application, and free the place."""
        super().connection_lost(exc)
        # uvicorn tells only the newest request, which of several is not the one being answered.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.server_state.forget(self)
        self.server_state.opened.dec()

    # What comes

    def data_received(self, data: bytes) -> None:
        """Read on, within the limits."""
        rest = memoryview(data)
        while rest and self._phase not in (_Phase.BROKEN, _Phase.LINGER):
            self._read(rest[:_READ_AT_ONCE_BYTES])
            rest = rest[_READ_AT_ONCE_BYTES:]

    def _read(self, data: memoryview) -> None:
        before, started = self._phase, self.scope
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if self._phase is not _Phase.LINGER:  # as it is when the client has left
                self._refuse(_cause(error))
            return
        delivered = self._deliver_body()
        same = self.scope is started
        try:
            if self._phase is _Phase.HEAD or self._phase is _Phase.IDLE:
                # How much of the data is the head's is known only if it has nothing else.
                waited = before is self._phase and same
                self._head_bytes = self._head_bytes + len(data) if waited else 0
                self._check_growing_head()
                if self._phase is _Phase.HEAD and not waited and not self._answering:
                    self._wait(_Phase.HEAD, self.loop.time())
            elif self._phase is _Phase.BODY:
                self._body_bytes += delivered
                framing = len(data) - _FRAMING_PER_BYTE * delivered
                known = before is _Phase.BODY and same
                self._framing_bytes = max(0, self._framing_bytes + framing) if known else 0
                if self._framing_bytes > MAX_FRAMING_BYTES:
                    raise InvalidRequest(
                        f"chunk extensions and trailers have more than {MAX_FRAMING_BYTES} bytes"
                    )
        except ServiceError as error:
            self._refuse(error)

    def _parse(self, rest: memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                taken = offer.args[0]
            else:
                return
            # The parser has read the head and would read no body. Another one is told the same
            # head without the offer, and reads on. Inside the `except` the offer would pass for
            # the cause of what this raises (`_cause`).
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)
            rest = rest[taken:]

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        """Read the head of a request."""
        super().on_message_begin()
        self._phase = _Phase.HEAD

    def on_headers_complete(self) -> None:
        """Check the head, and let the application begin.

        Raises:
            ServiceError: the request is refused, see `_check_head`, or its client has left.
        """
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise InvalidRequest("CONNECT is for proxies, and this server is not one")
            return  # read again without the offer
        self._check_head()
        if self.expect_100_continue and self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # a client of HTTP/1.0 would take it for the answer
        if self.parser.get_method() == b"POST" and self._has_left():
            self.server_state.cut(self, "left")
            self._phase = _Phase.LINGER
            raise Cancelled("the client left")  # so that nothing behind it is read
        if len(self.pipeline) >= MAX_PIPELINED:
            raise Overloaded(
                f"more than {MAX_PIPELINED} requests of this connection wait for their answers",
                retry_after_s=1.0,
            )
        if self._turned_away():
            return
        self._exchange = self.app = _Exchange(self.config.loaded_app)
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle
        self.headers = []  # of the trailers, which are not the request's headers
        self.cycle.transport = self._answers
        if self._reserved:
            self.cycle.keep_alive = False
        self._begin_body()

    def _has_left(self) -> bool:
        """Whether the client has closed the connection, of which we are told behind its request.

        In a crowd that waits for no answer every connection is one of these by the time that it
        is read. To begin with its request, and be told then, would take all the time there is.
        """
        connection = self.transport.get_extra_info("socket")
        state: bytes = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return state[0] != _ESTABLISHED

    def _begin_body(self) -> None:
        self._phase = _Phase.BODY
        self.server_state.waiting.pop(self, None)
        self._watch_body(self.loop.time())

    def _turned_away(self) -> bool:
        """Answer a request that has no chance, without the application, and throw its body away."""
        # An answer has its turn after those before it, and a client that waits for leave to send
        # its body may send it or not.
        if self._answering or self.expect_100_continue:
            return False
        error = self.server_state.gate(self.parser.get_method(), self.url, self.headers)
        if error is None:
            return False
        self.server_state.total_requests += 1
        self.cycle = _TURNED_AWAY
        self._write_error(error, last=self._reserved or not self.parser.should_keep_alive())
        self.headers = []
        if self._phase is not _Phase.LINGER:
            self._begin_body()
        return True

    def on_message_complete(self) -> None:
        """Tell the application that its request is whole."""
        if self.parser.should_upgrade() or self._phase is _Phase.LINGER:
            return
        self._deliver_body()
        super().on_message_complete()
        if self.cycle.response_complete:
            self._wait(_Phase.IDLE, self.loop.time())
        else:
            self._phase = _Phase.WORK

    def _deliver_body(self) -> int:
        """Give what was read of a body to its request; how many bytes that was."""
        if not self._pieces:
            return 0
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        HttpToolsProtocol.on_body(self, body)
        return len(body)

    def _check_growing_head(self) -> None:
        """Refuse a head that is too large before its end.

        Raises:
            UrlTooLong: already now.
            HeadersTooLarge: already now.
        """
        if self._phase is _Phase.HEAD and self.scope is not None:
            _check_url(self.url)
            _check_count(len(self.headers))
        if self._head_bytes > MAX_URL_BYTES + MAX_HEADERS_BYTES:
            raise _too_many_header_bytes()

    def _check_head(self) -> None:
        """Check a whole head.

        Raises:
            UrlTooLong: the URL has too many bytes.
            HeadersTooLarge: too many bytes, or too many headers.
            InvalidRequest: another version of HTTP, or a head that two readers could understand
                in two ways.
            TooManyConnections: the connection is kept for probes, and this is none.
        """
        _check_url(self.url)
        _check_count(len(self.headers))
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise InvalidRequest(f"this server does not speak HTTP/{version}; send HTTP/1.1")
        total, hosts = 0, []
        for name, value in self.headers:
            size = len(name) + len(value)
            total += size
            if size > MAX_HEADER_BYTES:
                raise HeadersTooLarge(f"a header has more than {MAX_HEADER_BYTES} bytes")
            if name == b"host":
                hosts.append(value)
            elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
                raise InvalidRequest(
                    "the only transfer coding that this server reads is chunked, in HTTP/1.1"
                )
        if total > MAX_HEADERS_BYTES:
            raise _too_many_header_bytes()
        if len(hosts) != 1 and (hosts or version == "1.1"):
            raise InvalidRequest(f"a request needs one Host header; this one has {len(hosts)}")
        if hosts and not _is_host(hosts[0]):
            raise InvalidRequest("the Host header must be a host, or a host and a port")
        if self._reserved and not self.url.startswith(PROBES):
            self.server_state.count_cut("crowded")
            raise TooManyConnections("this server has no connection left; try again later")

    # What is answered

    def on_response_complete(self) -> None:
        """Turn to the next request."""
        self.server_state.total_requests += 1
        if self._answers.head:  # it was all of the answer: no body follows one to HEAD
            self._answers.flush()
        if self.transport.is_closing() or self._phase is _Phase.LINGER:
            return
        self.flow.resume_reading()
        now = self.loop.time()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._running = cycle
            task = self.loop.create_task(cycle.run_asgi(app))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)
        elif self._last_word is not None:
            self._write_error(self._last_word, last=True)
        elif self._phase is _Phase.BODY:
            self._deadline = now + self._limits.body_timeout_s
        elif self._phase is _Phase.HEAD:  # of a request that came before this answer was ready
            self._wait(_Phase.HEAD, now)
        else:
            self._wait(_Phase.IDLE, now)

    def pause_writing(self) -> None:
        """Wait for a client that does not take its answers."""
        super().pause_writing()
        self.server_state.waiting.setdefault(self, self.loop.time())

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        if self._phase in (_Phase.WORK, _Phase.BODY, _Phase.BROKEN):
            self.server_state.waiting.pop(self, None)

    def _refuse(self, error: ServiceError) -> None:
        """Answer with an error, after the requests before this one, and read no further."""
        log.debug("connection refused", status=int(error.http_status), reason=str(error))
        self._pieces.clear()
        if self._phase is _Phase.BODY:
            if self.cycle.response_complete:
                self._linger()
                return
            self._phase = _Phase.BROKEN
            self.cycle.keep_alive = False
            self._exchange.fault = error
            self.cycle.message_event.set()
        elif self._answering:
            self._phase = _Phase.BROKEN
            self._last_word = error
        else:
            self._write_error(error, last=True)

    @property
    def _answering(self) -> bool:
        # Of several requests the newest is answered last.
        return self.cycle is not None and not self.cycle.response_complete

    def _write_error(self, error: ServiceError, *, last: bool) -> None:
        state, status = self.server_state, int(error.http_status)
        given = b""
        for name, value in self.headers or ():
            if name == _ID_HEADER:
                given = value
        identity = request_ids.choose(given.decode("latin-1")).encode()
        state.count_response(status)
        # No body would be expected after a HEAD. Before the URL of a request the parser has the
        # method of the one before.
        whole = self.parser.get_method() != b"HEAD" or not self.url
        path = self.url.decode("latin-1")
        said = state.said(error, open_inference=is_open_inference(path))
        self.transport.write(said.answer(state.default_headers, identity, last=last, whole=whole))
        if last:
            self._linger()

    def _write(self, data: bytes) -> None:
        """Write an answer; a large one is counted until the client has taken it."""
        if self.transport.is_closing():  # the application is told in the next turn of the loop
            return
        if len(data) <= LARGE_BYTES:
            self.transport.write(data)
            return
        unread = self.server_state.unread
        if self.has_taken_all():
            unread.forget(self)
        self.transport.write(data)
        unread.add(self, len(data))

    def has_taken_all(self) -> bool:
        """Whether the client has taken all answers."""
        return not self._pending()

    def cut_unread(self) -> None:
        """End the connection, because too many answers are not taken."""
        self.server_state.cut(self, "unread")

    def _end(self) -> None:
        """Close after an answer that was the last."""
        if self._phase in (_Phase.BODY, _Phase.BROKEN):
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        self._wait(_Phase.LINGER, self.loop.time())
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:  # TLS throws away by itself what still comes
                self.transport.close()

    # Time

    def _wait(self, phase: _Phase, now: float) -> None:
        """Wait for the client in a phase from now on."""
        if phase is _Phase.HEAD:
            limit = self._limits.header_timeout_s
            if self._reserved:
                limit = min(limit, _RESERVE_HEADER_TIMEOUT_S)
        else:
            limit = self._limits.keep_alive_s if phase is _Phase.IDLE else _LINGER_S
        self._phase, self._deadline = phase, now + limit
        self.server_state.waiting[self] = now
        self.server_state.waiting.move_to_end(self)

    def _watch_body(self, now: float) -> None:
        self._body_bytes, self._deadline = 0, now + self._limits.body_timeout_s

    def check(self, now: float) -> None:
        """Cut the connection if its client takes too long; called about every second.

        Args:
            now: loop time, seconds.
        """
        if self._is_stuck(now):
            self.server_state.cut(self, "write_timeout")
        elif self._unsent:
            return  # it reads its answer; its time to send something begins when it has that
        elif self._phase is _Phase.BODY:
            self._check_body(now)
        elif now < self._deadline:
            return
        elif self._phase is _Phase.HEAD and not self._answering:
            self._check_late_head()
        elif self._phase is _Phase.IDLE:
            self.server_state.cut(self, "idle")
        elif self._phase is _Phase.LINGER:
            self.transport.close()

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has taken nothing of its answers for too long."""
        unsent = self._pending()
        if not unsent:
            self.server_state.unread.forget(self)
        if not unsent or not self._unsent or unsent < self._unsent:
            self._taken_at = now
        self._unsent = unsent
        limit = self._limits.write_timeout_s
        if self.server_state.draining:
            limit = min(limit, _DRAINING_WRITE_TIMEOUT_S)
        return now - self._taken_at >= limit

    def _pending(self) -> int:
        """0 if the client has taken all answers, else a number that falls when it takes some."""
        return self.transport.get_write_buffer_size()

    def _check_body(self, now: float) -> None:
        if self.cycle.response_complete:  # what comes is thrown away, but not for ever
            if now >= self._deadline:
                self.server_state.cut(self, "body_timeout")
        elif self.flow.read_paused or self.cycle.waiting_for_100_continue:
            self._watch_body(now)  # it is we who are not reading
        elif now >= self._deadline:
            if self._body_bytes < MIN_BODY_BYTES_PER_S * self._limits.body_timeout_s:
                self.server_state.count_cut("body_timeout")
                self._refuse(
                    RequestTimeout(
                        f"less than {MIN_BODY_BYTES_PER_S} bytes a second of the body came in "
                        f"{self._limits.body_timeout_s:g} seconds"
                    )
                )
            else:
                self._watch_body(now)

    def _check_late_head(self) -> None:
        if self.scope is None or not self.url:
            self.server_state.cut(self, "header_timeout")
            return
        self.server_state.count_cut("header_timeout")
        self._refuse(
            RequestTimeout(
                f"the head of the request did not come in {self._limits.header_timeout_s:g} seconds"
            )
        )


class _Exchange:
    """The application for one request.

    Attributes:
        fault: why the rest of the body cannot be read; raised from `receive`.
    """

    def __init__(self, app: Any) -> None:
        self._app: ASGIApp = app
        self.fault: ServiceError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_fail() -> Message:
            message = await receive()
            if self.fault is not None:
                raise self.fault
            return message

        try:
            await self._app(scope, receive_or_fail, send)
        except ServiceError as error:  # the application has no handler for it
            body = error_json(
                error_body(error, request_ids.choose("")),
                open_inference=is_open_inference(scope["path"]),
            )
            headers = _headers(error, body)
            status = int(error.http_status)
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})


class _TurnedAway:
    """Stands for uvicorn's cycle of a request that was turned away: its answer is complete."""

    response_complete = True
    waiting_for_100_continue = False
    keep_alive = True
    disconnected = False
    message_event = asyncio.Event()


_TURNED_AWAY: Any = _TurnedAway()


class _Answers(asyncio.Transport):
    """Where uvicorn writes the answers of a connection.

    It writes the head of an answer and its body one by one. They leave together if they come in
    one turn of the event loop: to write gives the interpreter up, which others then have.

    Args:
        transport: of the connection.
        write: writes an answer to it.
        end: called in place of closing it.

    Attributes:
        head: of an answer, which waits for its body.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        write: Callable[[bytes], None],
        end: Callable[[], None],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._write = write
        self._end = end
        self.head = b""

    def write(self, data: Any) -> None:
        if data.startswith(_HEAD):
            self.flush()
            self.head = data
            asyncio.get_running_loop().call_soon(self.flush)
        else:
            head, self.head = self.head, b""
            self._write(head + data)

    def flush(self) -> None:
        """Write a head whose body did not come yet."""
        head, self.head = self.head, b""
        if head:
            self._transport.write(head)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._end()


def _cause(error: httptools.HttpParserError) -> ServiceError:
    """The failure behind an error of the parser, or behind what a callback raised in it."""
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
    if isinstance(cause, ServiceError):
        return cause
    if cause is not None:
        return InvalidRequest("the request's URL cannot be read")
    return InvalidRequest(f"this is not a request of HTTP/1.1: {error}")


def _check_url(url: bytes) -> None:
    if len(url) > MAX_URL_BYTES:
        raise UrlTooLong(f"the URL has more than {MAX_URL_BYTES} bytes")


def _check_count(headers: int) -> None:
    if headers > MAX_HEADERS:
        raise HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers")


def _too_many_header_bytes() -> HeadersTooLarge:
    return HeadersTooLarge(f"the headers have more than {MAX_HEADERS_BYTES} bytes")


def _is_host(value: bytes) -> bool:
    if _HOST.fullmatch(value):
        return True
    literal = _IPV6_HOST.fullmatch(value)
    if literal is None:
        return False
    try:
        IPv6Address(literal[1].decode())
    except AddressValueError:
        return False
    return True


class _Said:
    """The answer to an error, prepared but for what differs from request to request.

    Attributes:
        error: that is answered.
        open_inference: whether it is answered in the form of that protocol, which has no id.
    """

    def __init__(self, error: ServiceError, *, open_inference: bool) -> None:
        self.error = error
        self.open_inference = open_inference
        body = error_json(error_body(error, _ANY_ID), open_inference=open_inference)
        self._before, self._after = body, b""
        if not open_inference:
            self._before, self._after = body.rsplit(_ANY_ID.encode(), 1)
        headers = [(b"content-type", b"application/json"), *SECURITY_HEADERS, *_of(error)]
        self._head = STATUS_LINE[int(error.http_status)] + _lines(headers)

    def answer(
        self, headers: list[tuple[bytes, bytes]], identity: bytes, *, last: bool, whole: bool
    ) -> bytes:
        """The bytes of the answer to one request.

        Args:
            headers: of all answers.
            identity: of the request.
            last: whether the connection ends with it.
            whole: whether it has a body.
        """
        written = identity if identity.isalnum() else dumps(identity.decode())[1:-1].encode()
        body = self._before if self.open_inference else self._before + written + self._after
        return b"".join(
            (
                self._head,
                _lines(headers),
                b"content-length: %d\r\n%s: %s\r\n" % (len(body), _ID_HEADER, identity),
                b"connection: close\r\n\r\n" if last else b"\r\n",
                body if whole else b"",
            )
        )


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(name + b": " + value + b"\r\n" for name, value in headers)


def _headers(error: ServiceError, body: bytes) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *SECURITY_HEADERS,
        *_of(error),
    ]


def _of(error: ServiceError) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
