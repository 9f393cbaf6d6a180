"""Turns requests away by their head alone: of callers who may not ask, and while no model has room.

A crowd asks ten times as often as the server can answer, and what it costs to refuse is taken from
those that are answered. What is known already is therefore asked before the application begins: the
same questions as there (`Catalogue.check_room`), at a fifth of the cost.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from math import inf
from time import monotonic
from typing import NamedTuple
from urllib.parse import parse_qsl

import structlog

from service.errors import ServiceError
from service.logs import Summed
from service.metrics.replica import Metrics
from service.priority import Priority
from service.security.access import Access
from service.tasks.catalogue import Catalogue, Refused
from service.transport import priority
from service.transport.http.endpoints import INFER
from service.transport.http.probes import PROBES

# What a small request takes on a busy loop from its head to its place in the queue, seconds.
# Without it one free place would let all requests pass that come in one turn of the loop.
_ON_THE_WAY_S = 0.02
# How long the answer for a URL and a class is kept, seconds: a full queue takes longer to empty.
_SHUT_S = 0.005
_PRIORITY = priority.HEADER.encode()
_MOST_SHUT = 64  # URLs: callers choose them, so their number is bounded

log = structlog.get_logger(__name__)


class _Shut(NamedTuple):
    """The refusal that all requests for a URL get until a time of the monotonic clock."""

    until: float
    task: str
    refused: Refused


class Gate:
    """Decides by the head of a request whether the request would be refused.

    Args:
        catalogue: of the models.
        tasks: their names.
        metrics: count the requests that are turned away.
        access: who may ask.
        cross_origin: whether pages of other origins may ask, whose answers the application writes.
        open_paths: what anybody may ask for, beside probes.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tasks: Collection[str],
        metrics: Metrics,
        access: Access,
        *,
        cross_origin: bool = False,
        open_paths: Collection[bytes] = (),
    ) -> None:
        self._catalogue = catalogue
        self._tasks = {f"/v1/{task}".encode(): task for task in tasks}
        self._metrics = metrics
        self._access = access
        self._cross_origin = cross_origin
        self._open_paths = open_paths
        self._turned_away = Summed(log.info, "requests turned away")
        # When requests were let pass that may not have reached the queue yet.
        self._passing = defaultdict[str, deque[float]](deque)
        self._shut: dict[tuple[bytes, bytes], _Shut] = {}

    def __call__(
        self, method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> ServiceError | None:
        """Why a request is turned away, if it is; it is counted then.

        What is not certain is left to the application: a query that cannot be read, and pages of
        other origins, which could not read the answer.
        """
        if self._cross_origin and any(name == b"origin" for name, _ in headers):
            return None
        if url.startswith(b"/") and not self._is_open(method, url):
            caller = self._access.admit(headers)
            if isinstance(caller, ServiceError):
                return caller
        if method != b"POST":
            return None
        now = monotonic()
        named = next((value for name, value in headers if name == _PRIORITY), b"high")
        shut = self._shut.get((url, named))
        if shut is None or now >= shut.until:
            shut = self._look(url, named, now)
        if shut is None:
            return None
        error = shut.refused.refusal.error
        self._metrics.requests.turned_away(
            shut.task, shut.refused.model, shut.refused.refusal.reason, error
        )
        self._turned_away.add(code=error.code)
        return error

    def _is_open(self, method: bytes, url: bytes) -> bool:
        if url.startswith(PROBES):
            return True
        return method in (b"GET", b"HEAD") and url.partition(b"?")[0] in self._open_paths

    def _look(self, url: bytes, named: bytes, now: float) -> _Shut | None:
        path, _, query = url.partition(b"?")
        try:
            if (infer := INFER.fullmatch(path.decode("latin-1"))) is not None:
                asked = _Asked(infer[1])
                task = self._catalogue.describe(infer[1]).card.task
            elif path in self._tasks:
                task = self._tasks[path]
                asked = _asked(query)
            else:
                return None
            only = None if asked.model is None else self._catalogue.find(task, asked.model)
            passing = self._passing[task]
            refused = self._catalogue.refusal(
                task,
                only=only,
                timeout_s=asked.timeout_s,
                places=1 + _count_passing(passing, now),
                priority=priority.lower(asked.priority, priority.read(named.decode("latin-1"))),
            )
        except (ServiceError, ValueError):
            return None
        if refused is None:
            passing.append(now)
            return None
        if len(self._shut) >= _MOST_SHUT:
            self._shut.clear()
        shut = self._shut[url, named] = _Shut(now + _SHUT_S, task, refused)
        return shut


def _count_passing(passing: deque[float], now: float) -> int:
    """How many requests are on their way from here to the queue."""
    while passing and now - passing[0] > _ON_THE_WAY_S:
        passing.popleft()
    return len(passing)


class _Asked(NamedTuple):
    """What a query says that matters here."""

    model: str | None = None
    timeout_s: float | None = None
    priority: Priority = "high"


def _asked(query: bytes) -> _Asked:
    if not any(option in query for option in (b"model=", b"timeout=", b"priority=")):
        return _Asked()
    options = dict(parse_qsl(query.decode("latin-1")))
    timeout_s = None if (given := options.get("timeout")) is None else float(given)
    if timeout_s is not None and not 0 < timeout_s < inf:
        raise ValueError("no request has such a timeout")
    return _Asked(options.get("model"), timeout_s, priority.read(options.get("priority")))
