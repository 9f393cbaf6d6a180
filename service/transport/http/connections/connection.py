"""What does a connection do next: read, let the application answer, refuse, or end?"""

import asyncio
from typing import Any

import structlog
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import Cancelled, InvalidRequest, Overloaded, ServiceError, TooManyConnections
from service.transport.http.connections.answers import Answers
from service.transport.http.connections.application import TURNED_AWAY, Exchange
from service.transport.http.connections.deadlines import Deadlines, Phase
from service.transport.http.connections.head import check_head
from service.transport.http.connections.held import Connections
from service.transport.http.connections.reading import Reading, waited
from service.transport.http.probes import PROBES

log = structlog.get_logger(__name__)

MAX_PIPELINED = 64
_READ_AT_ONCE_BYTES = 64 * 1024  # what a client may send more than allowed before it is seen


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
        self._deadlines = Deadlines(server_state.limits)
        self._reading = Reading(self, self._deadlines)
        super().__init__(config, server_state, app_state, _loop)
        self.url, self.headers = b"", []  # until a request begins, before which may be an error
        self._reserved = False
        self._running: Any = None  # uvicorn's cycle of the request that is being answered
        self._exchange: Exchange
        self._answers: Answers
        self._last_word: ServiceError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find a place for the connection, and wait for its first request."""
        super().connection_made(transport)
        self._answer_over(transport)
        self.server_state.opened.inc()
        now = self.loop.time()
        self._reserved = not self.server_state.admit(self, now)
        if self._reserved or self.server_state.draining:
            self._deadlines.hurry()
        self._wait(Phase.HEAD, now)

    def _answer_over(self, transport: asyncio.Transport) -> None:
        self._answers = Answers(transport, self, self.server_state.unread, self._end)

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
        while rest and self._deadlines.phase not in (Phase.BROKEN, Phase.LINGER):
            try:
                if self._reading.read(rest[:_READ_AT_ONCE_BYTES]) and not self._answering:
                    self._wait(Phase.HEAD, self.loop.time())
            except ServiceError as error:
                self._refuse(error)
            rest = rest[_READ_AT_ONCE_BYTES:]

    def on_message_begin(self) -> None:
        """Read the head of a request.

        Raises:
            ServiceError: nothing is read behind the last answer.
        """
        if self._deadlines.phase is Phase.LINGER:
            raise Cancelled("the connection ends")
        super().on_message_begin()
        self._deadlines.phase = Phase.HEAD

    def on_headers_complete(self) -> None:
        """Check the head, and let the application begin.

        Raises:
            ServiceError: the request is refused, or its client has left.
        """
        method = self.parser.get_method()
        if self.parser.should_upgrade():
            if method == b"CONNECT":
                raise InvalidRequest("CONNECT is for proxies, and this server is not one")
            return  # read again without the offer
        self._check_head()
        if self.expect_100_continue and self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # a client of HTTP/1.0 would take it for the answer
        if method == b"POST":
            self._look_at_client()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise Overloaded(
                f"more than {MAX_PIPELINED} requests of this connection wait for their answers",
                retry_after_s=1.0,
            )
        if self._turned_away(method):
            return
        self._exchange = self.app = Exchange(self.config.loaded_app)
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle
        self.headers = []  # of the trailers, which are not the request's headers
        self.cycle.transport = self._answers
        # uvicorn asks the connections to end once, and hears of some only after that.
        if self._reserved or self.server_state.draining:
            self.cycle.keep_alive = False
        self._begin_body()

    def _look_at_client(self) -> None:
        """Find out whether the client is still there, and how late its request is read.

        Raises:
            Cancelled: it has left, and nothing behind this is to be read.
        """
        left, seconds = waited(self.transport)
        if self.cycle is None:  # later ones may have waited for the answers before them
            self.server_state.request_read(seconds)
        if left:
            self.server_state.cut(self, "left")
            self._deadlines.phase = Phase.LINGER
            raise Cancelled("the client left")

    def _check_head(self) -> None:
        check_head(self.url, self.parser.get_http_version(), self.headers)
        if self._reserved and not self.url.startswith(PROBES):
            self.server_state.count_cut("crowded")
            raise TooManyConnections("this server has no connection left; try again later")

    def _turned_away(self, method: bytes) -> bool:
        """Answer a request that has no chance, without the application, and throw its body away."""
        # An answer has its turn after those before it, and a client that waits for leave to send
        # its body may send it or not.
        if self._answering or self.expect_100_continue:
            return False
        error = self.server_state.gate(method, self.url, self.headers)
        if error is None:
            return False
        self.server_state.total_requests += 1
        self.cycle = TURNED_AWAY
        leaves = self._reserved or self.server_state.draining
        self._write_error(error, last=leaves or not self.parser.should_keep_alive())
        self.headers = []
        if self._deadlines.phase is not Phase.LINGER:
            self._begin_body()
        return True

    def _begin_body(self) -> None:
        self.server_state.waiting.pop(self, None)
        self._deadlines.watch_body(self.loop.time())

    def on_message_complete(self) -> None:
        """Tell the application that its request is whole."""
        if self.parser.should_upgrade() or self._deadlines.phase is Phase.LINGER:
            return
        if self._reading.pieces:
            self._reading.deliver()
        super().on_message_complete()
        if self.cycle.response_complete:
            self._wait(Phase.IDLE, self.loop.time())
        else:
            self._deadlines.phase = Phase.WORK

    # What is answered

    @property
    def _answering(self) -> bool:
        # Of several requests the newest is answered last.
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Turn to the next request."""
        self.server_state.total_requests += 1
        if self._answers.head:  # it was all of the answer: no body follows one to HEAD
            self._answers.flush()
        phase = self._deadlines.phase
        if self.transport.is_closing() or phase is Phase.LINGER:
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
        elif phase is Phase.BODY:
            self._deadlines.watch_body(now)
        else:  # the head of the next request may have begun before this answer was ready
            self._wait(Phase.HEAD if phase is Phase.HEAD else Phase.IDLE, now)

    def pause_writing(self) -> None:
        """Wait for a client that does not take its answers."""
        super().pause_writing()
        self.server_state.waiting.setdefault(self, self.loop.time())

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        if self._deadlines.phase in (Phase.WORK, Phase.BODY, Phase.BROKEN):
            self.server_state.waiting.pop(self, None)

    def _refuse(self, error: ServiceError) -> None:
        """Answer with an error, after the requests before this one, and read no further."""
        if self._deadlines.phase is Phase.LINGER:  # the client has left, or had its last answer
            return
        log.debug("connection refused", status=int(error.http_status), reason=str(error))
        if self._deadlines.phase is Phase.BODY:
            if self.cycle.response_complete:
                self._linger()
                return
            self._deadlines.phase = Phase.BROKEN
            self.cycle.keep_alive = False
            self._exchange.fault = error
            self.cycle.message_event.set()
        elif self._answering:
            self._deadlines.phase = Phase.BROKEN
            self._last_word = error
        else:
            self._write_error(error, last=True)

    def _write_error(self, error: ServiceError, *, last: bool) -> None:
        # No body would be expected after a HEAD. Before the URL of a request the parser has the
        # method of the one before.
        whole = self.parser.get_method() != b"HEAD" or not self.url
        state = self.server_state
        answer = state.refusals.answer(
            error, self.url, self.headers, state.default_headers, last=last, whole=whole
        )
        self.transport.write(answer)
        if last:
            self._linger()

    def has_taken_all(self) -> bool:
        """Whether the client has taken all answers."""
        return not self._pending()

    def _pending(self) -> int:
        """0 if the client has taken all answers, else a number that falls when it takes some."""
        return self.transport.get_write_buffer_size()

    # How it ends

    def cut_unread(self) -> None:
        """End the connection, because too many answers are not taken."""
        self.server_state.cut(self, "unread")

    def shutdown(self) -> None:
        """End after the answer that is due, or now, because the server leaves."""
        if self._answering:
            self.cycle.keep_alive = False
        elif self._deadlines.phase is not Phase.LINGER:
            self._end()

    def _end(self) -> None:
        """Close after an answer that was the last."""
        if self._deadlines.phase in (Phase.BODY, Phase.BROKEN):
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        self._wait(Phase.LINGER, self.loop.time())
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:  # TLS throws away by itself what still comes
                self.transport.close()

    def _wait(self, phase: Phase, now: float) -> None:
        """Wait for the client in a phase from now on."""
        self._deadlines.wait(phase, now)
        self.server_state.waiting[self] = now
        self.server_state.waiting.move_to_end(self)

    def check(self, now: float) -> None:
        """Cut the connection if its client takes too long; called about every second.

        Args:
            now: loop time, seconds.
        """
        unsent = self._pending()
        if not unsent:
            self.server_state.unread.forget(self)
        answering = self._answering
        late = self._deadlines.late(
            now,
            unsent,
            write_timeout_s=self.server_state.write_timeout_s,
            answering=answering,
            begun=bool(self.url),
            held_up=answering and (self.flow.read_paused or self.cycle.waiting_for_100_continue),
        )
        if late is None:
            return
        if late.reason is None:
            self.transport.close()
        elif late.error is None:
            self.server_state.cut(self, late.reason)
        else:
            self.server_state.count_cut(late.reason)
            self._refuse(late.error)
