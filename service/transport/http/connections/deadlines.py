"""What does a connection wait for, and since when does its client take too long?"""

from enum import Enum
from typing import NamedTuple

from service.errors import RequestTimeout
from service.metrics.replica import Cut
from service.settings.server import Server

MIN_BODY_BYTES_PER_S = 1024
_RESERVE_HEADER_TIMEOUT_S = 2.0
# After its last answer a connection goes on to read, or the client would lose the answer to the
# reset that unread bytes cause.
_LINGER_S = 2.0


class Phase(Enum):
    """What a connection has last read, and so what comes next."""

    HEAD = "the rest of a request's head, or the first one"
    BODY = "the rest of a request's body"
    WORK = "our answer"
    IDLE = "the next request"
    BROKEN = "our answer, before the end: the rest cannot be read"
    LINGER = "nothing: the last answer was given"


class Late(NamedTuple):
    """A deadline that has passed.

    Attributes:
        reason: as the cut is counted; without one the connection ends as it should.
        error: what its client is told, if anything.
    """

    reason: Cut | None
    error: RequestTimeout | None = None


class Deadlines:
    """Those of one connection; times are loop time in seconds.

    Attributes:
        phase: what is waited for.
        body_bytes: that came of the body since its time began anew.
    """

    def __init__(self, limits: Server) -> None:
        self._limits = limits
        self._header_timeout_s = limits.header_timeout_s
        self.phase = Phase.HEAD
        self.body_bytes = 0
        self._until = 0.0
        self._unsent = 0  # bytes of answers, when last looked
        self._taken_at = 0.0  # when the client last took something of them

    def hurry(self) -> None:
        """Give less time for heads, because others want the place."""
        self._header_timeout_s = min(self._header_timeout_s, _RESERVE_HEADER_TIMEOUT_S)

    def wait(self, phase: Phase, now: float) -> None:
        """Wait for a head, for the next request or for the end from now on."""
        if phase is Phase.HEAD:
            limit = self._header_timeout_s
        else:
            limit = self._limits.keep_alive_s if phase is Phase.IDLE else _LINGER_S
        self.phase, self._until = phase, now + limit

    def watch_body(self, now: float) -> None:
        """Wait for a body, whose time begins now."""
        self.phase, self.body_bytes = Phase.BODY, 0
        self._until = now + self._limits.body_timeout_s

    def late(
        self,
        now: float,
        unsent: int,
        *,
        write_timeout_s: float,
        answering: bool,
        begun: bool,
        held_up: bool,
    ) -> Late | None:
        """Which deadline has passed; asked about every second.

        Args:
            now: when.
            unsent: 0 if the client has taken all answers, else a number that falls when it takes
                some.
            write_timeout_s: how long it may take nothing.
            answering: whether a request has no answer yet.
            begun: whether something has come of the head that is waited for.
            held_up: whether it is we who do not read the body.
        """
        if not unsent or not self._unsent or unsent < self._unsent:
            self._taken_at = now
        self._unsent = unsent
        if now - self._taken_at >= write_timeout_s:
            return Late("write_timeout")
        if unsent:
            return None  # it reads its answer; its time to send something begins when it has that
        if self.phase is Phase.BODY and answering and held_up:
            self.watch_body(now)
        return None if now < self._until else self._late_to_send(now, answering, begun)

    def _late_to_send(self, now: float, answering: bool, begun: bool) -> Late | None:
        match self.phase:
            case Phase.HEAD if not answering:
                return Late("header_timeout", self._late_head() if begun else None)
            case Phase.BODY if answering:
                return self._late_body(now)
            case Phase.BODY:  # what comes is thrown away, but not for ever
                return Late("body_timeout")
            case Phase.IDLE:
                return Late("idle")
            case Phase.LINGER:
                return Late(None)
        return None

    def _late_head(self) -> RequestTimeout:
        return RequestTimeout(
            f"the head of the request did not come in {self._limits.header_timeout_s:g} seconds"
        )

    def _late_body(self, now: float) -> Late | None:
        period_s = self._limits.body_timeout_s
        if self.body_bytes >= MIN_BODY_BYTES_PER_S * period_s:
            self.watch_body(now)
            return None
        return Late(
            "body_timeout",
            RequestTimeout(
                f"less than {MIN_BODY_BYTES_PER_S} bytes a second of the body came in "
                f"{period_s:g} seconds"
            ),
        )
