"""Turns requests away by their head alone, while no model that may answer them has room.

A crowd asks ten times as often as the server can answer, and what it costs to refuse is taken from
those that are answered. What is known already is therefore asked before the application begins: the
same questions as there (`Catalogue.check_room`), at a fifth of the cost.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl

import structlog

from service.catalogue import Catalogue
from service.core import Core
from service.errors import ServiceError
from service.logs import Summed
from service.metrics import Metrics, Task

AnyCore = Core[Any, Any, Any, Any, Any]

# What a small request takes from its head to its place in the queue, seconds. Without it all that
# come in one turn of the event loop would be let pass by one free place.
_ON_THE_WAY_S = 0.005

log = structlog.get_logger(__name__)


class Gate:
    """Knows of a head whether its request would be refused.

    Args:
        catalogue: of the models.
        tasks: by path.
        metrics: count the requests that are turned away.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tasks: Mapping[bytes, tuple[Task, type[AnyCore]]],
        metrics: Metrics,
    ) -> None:
        self._catalogue = catalogue
        self._tasks = tasks
        self._metrics = metrics
        self._turned_away = Summed(log.info, "requests turned away")
        # When requests were let pass that may not have reached the queue yet.
        self._passing = {path: deque[float]() for path in tasks}

    def __call__(
        self, method: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> ServiceError | None:
        """Why a request is turned away, if it is; it is counted then.

        What is not certain is left to the application: a query that cannot be read, and pages of
        other origins, which could not read the answer.
        """
        path, _, query = url.partition(b"?")
        if method != b"POST" or path not in self._tasks:
            return None
        task, kind = self._tasks[path]
        try:
            model, timeout_s = _asked(query)
            only = None if model is None else self._catalogue.find(kind, model)
            places = 1 + self._count_passing(path)
            if self._catalogue.has_room(kind, only=only, timeout_s=timeout_s, places=places):
                self._passing[path].append(monotonic())
                return None
        except (ServiceError, ValueError):
            return None
        if any(name == b"origin" for name, _ in headers):
            return None
        try:
            with self._metrics.request(task, "http") as counted:
                self._catalogue.check_room(
                    kind, counted, only=only, timeout_s=timeout_s, places=places
                )
        except ServiceError as error:
            self._turned_away.add(code=error.code)
            return error.with_traceback(None)
        return None

    def _count_passing(self, path: bytes) -> int:
        """How many requests are on their way from here to the queue."""
        passing, now = self._passing[path], monotonic()
        while passing and now - passing[0] > _ON_THE_WAY_S:
            passing.popleft()
        return len(passing)


def _asked(query: bytes) -> tuple[str | None, float | None]:
    """The model and the timeout of a query, seconds."""
    if b"model=" not in query and b"timeout=" not in query:
        return None, None
    options = dict(parse_qsl(query.decode("latin-1")))
    timeout = options.get("timeout")
    return options.get("model"), None if timeout is None else float(timeout)
