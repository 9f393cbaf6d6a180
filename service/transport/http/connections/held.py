"""Which connections are held, and which gives way where there is no room for a new one?"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

from uvicorn.server import ServerState

from service.errors import ServiceError
from service.metrics.replica import Cut, Metrics, Port
from service.settings.server import Server
from service.transport.http.connections.head import Header
from service.transport.http.connections.refusals import Refusals
from service.transport.unread import Reader, UnreadAnswers

# At the limit a connection gives way to a new one when its client has kept it waiting so long.
_MAY_BE_EVICTED_S = 1.0
_DRAINING_WRITE_TIMEOUT_S = 2.0
_LONGEST_LOOK_S = 1.0

# Of a method, a URL and headers.
Gate = Callable[[bytes, bytes, Sequence[Header]], ServiceError | None]


# Told of a request how long after it had come it was read, seconds.
RequestRead = Callable[[float], None]


def _let_pass(_method: bytes, _url: bytes, _headers: object) -> None:
    """Turn nobody away."""


class Held(Reader, Protocol):
    """A connection, as it is known here."""

    transport: asyncio.Transport

    def check(self, now: float) -> None:
        """End the connection if its client takes too long."""


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
        request_read: told of the first request of each connection.

    Attributes:
        draining: whether the server is leaving, so that stuck connections end soon.
        refusals: answers to errors that the application does not see.
        waiting: connections that wait for their client, longest first, and since when in loop time.
    """

    connections: set[Held]  # type: ignore[assignment]

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
        request_read: RequestRead = lambda _: None,
    ) -> None:
        super().__init__()
        self.unread = UnreadAnswers(inf) if unread is None else unread
        self.limits = limits
        self.draining = False
        self.opened = metrics.connections[port]
        self.refusals = Refusals(metrics, port)
        self.gate = gate
        self.request_read = request_read
        self._cut = metrics.connections_cut[port]
        self._most = most
        self._reserve = reserve
        self.waiting: OrderedDict[Held, float] = OrderedDict()
        self._reserved: OrderedDict[Held, None] = OrderedDict()

    @property
    def write_timeout_s(self) -> float:
        """How long a client may take nothing of its answers."""
        limit = self.limits.write_timeout_s
        return min(limit, _DRAINING_WRITE_TIMEOUT_S) if self.draining else limit

    def admit(self, connection: Held, now: float) -> bool:
        """Make room for a new connection; whether there was some, or it is one of the reserve."""
        if len(self.connections) <= self._most:
            return True
        if self.waiting:
            longest, since = next(iter(self.waiting.items()))
            if now - since >= _MAY_BE_EVICTED_S:
                self.cut(longest, "evicted")
                return True
        self._reserved[connection] = None
        if len(self._reserved) > self._reserve:
            self.cut(next(iter(self._reserved)), "crowded")
        return False

    def cut(self, connection: Held, reason: Cut) -> None:
        """End a connection at once."""
        self.count_cut(reason)
        self.forget(connection)
        connection.transport.abort()

    def count_cut(self, reason: Cut) -> None:
        """Count a connection that the server ends because of its client."""
        self._cut[reason].inc()

    def forget(self, connection: Held) -> None:
        """Keep no place for a connection that ends."""
        self.waiting.pop(connection, None)
        self._reserved.pop(connection, None)
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
