"""Which requests are admitted: places in the queue of a model, and why there are none."""

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from service.batching.forecast import Forecast
from service.errors import Draining, EngineUnavailable, NotReady, Overloaded, ServiceError
from service.metrics import ModelMetrics, Rejection


class Places(Protocol):
    """The places of a queue, and how many items are on a device."""

    @property
    def limit(self) -> int:
        """Most places that are given out at a time."""

    @property
    def held(self) -> int:
        """Places that were given out and not given back."""

    @property
    def running(self) -> int:
        """Items on a device."""

    def take(self, places: int) -> bool:
        """Give out places, all or none, and say whether there were so many."""

    def give_back(self, places: int) -> None:
        """Take places back."""

    def changed_running(self, items: int) -> None:
        """Count items that went to a device, or with a negative number came back."""


class LocalPlaces:
    """The places of a queue that one process has for itself.

    Args:
        limit: as in `Places`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.running = 0

    def take(self, places: int) -> bool:
        """Give out places, all or none, and say whether there were so many."""
        if self.held + places > self.limit:
            return False
        self.held += places
        return True

    def give_back(self, places: int) -> None:
        """Take places back."""
        self.held -= places

    def changed_running(self, items: int) -> None:
        """Count items that went to a device, or with a negative number came back."""
        self.running += items


class Admission:
    """Places in the queue for the items of one request.

    A place is held from admission, through decoding and the queue, until the item goes to the
    device or is given up; the end of the context gives back what is left.

    Attributes:
        since: when the places were given, loop time, seconds.
        request_id: of the request whose places these are.
    """

    def __init__(
        self,
        places: int,
        release: Callable[[int], None],
        forecast: Forecast,
        since: float,
        request_id: str,
    ) -> None:
        self.since = since
        self.request_id = request_id
        self._places = places
        self._release = release
        self._forecast = forecast

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_back(self._places)
        if kind is asyncio.CancelledError:
            self._forecast.caller_left(asyncio.get_running_loop().time() - self.since)
        else:
            self._forecast.caller_answered()

    @property
    def patient_until(self) -> float:
        """When its caller, as callers are, will have left; loop time, seconds."""
        return self.since + self._forecast.patience_s

    def give_back(self, places: int = 1) -> None:
        """Give back places that are no longer needed."""
        self.forget(places)
        self._release(places)

    def forget(self, places: int = 1) -> None:
        """Do without places that were given back by others."""
        assert places <= self._places, "a place was given back twice: this is a bug"
        self._places -= places


class Refusal(NamedTuple):
    """Why a request is not admitted, as it is counted and as its caller is told."""

    reason: Rejection
    error: ServiceError


class AdmissionControl:
    """Gives out the places of a queue, and refuses what could not be answered in its time.

    Args:
        places: of the queue.
        forecast: how long answers will take.
        metrics: of the model.
        unavailable: why nothing can be run now, if so.
        released: is called when places were given back.
    """

    def __init__(
        self,
        places: Places,
        forecast: Forecast,
        metrics: ModelMetrics,
        *,
        unavailable: Callable[[], EngineUnavailable | None],
        released: Callable[[], None],
    ) -> None:
        self._places = places
        self._forecast = forecast
        self._metrics = metrics
        self._unavailable = unavailable
        self._released = released
        self._open = False
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether nothing is admitted any more."""
        return self._draining

    @property
    def held(self) -> int:
        """Places that were given out and not given back."""
        return self._places.held

    @property
    def wait_estimate_s(self) -> float:
        """Time in which everything admitted so far will have reached the device, seconds."""
        return (self._places.held + self._places.running) * self._forecast.seconds_per_item

    def open(self) -> None:
        """Begin to admit, and show it in the metrics."""
        self._open = True
        self.show()

    def show(self) -> None:
        """Let the metrics show this queue from now on."""
        self._metrics.show(
            lambda: self._places.held, lambda: self._places.running, lambda: self.wait_estimate_s
        )

    def drain(self) -> None:
        """Admit nothing any more."""
        self._draining = True

    def refusal(self, places: int = 1, timeout_s: float | None = None) -> Refusal | None:
        """Why so many places could not be taken now, if so; asking counts nowhere.

        Args:
            places: that are wanted.
            timeout_s: after which the answers are of no use, seconds; `None` where the caller
                did not say.
        """
        if self._draining:
            return Refusal("draining", Draining("this replica is draining"))
        if not self._open:
            return Refusal("not_ready", NotReady("this replica is starting"))
        if (unavailable := self._unavailable()) is not None:
            return Refusal("engine_unavailable", unavailable)
        held = self._places.held
        if held + places > self._places.limit:
            return self._full(held)
        ahead = held + self._places.running
        patience_s = min(self._forecast.patience_s, inf if timeout_s is None else timeout_s)
        # With nothing ahead the forecast is put to the test.
        if ahead and (answer_s := self._forecast.answer_s(ahead + places)) > patience_s:
            late = f"the answer would take {answer_s:.2g} s, and is wanted in {patience_s:.2g} s"
            return Refusal("too_late", Overloaded(late, retry_after_s=answer_s - patience_s))
        return None

    def check_room(self, places: int = 1, timeout_s: float | None = None) -> None:
        """Refuse what could not be admitted now; the arguments are those of `refusal`.

        Raises:
            NotReady: the replica does not admit yet.
            Draining: the replica no longer admits.
            EngineUnavailable: no device is left, or the model fails again and again.
            Overloaded: fewer places are free, or the answers would come too late.
        """
        if (refusal := self.refusal(places, timeout_s)) is not None:
            self._metrics.rejected[refusal.reason].inc()
            raise refusal.error

    def admit(self, places: int, timeout_s: float | None = None, request_id: str = "") -> Admission:
        """Take places in the queue for a request, all or none.

        Args:
            places: as in `refusal`.
            timeout_s: as in `refusal`.
            request_id: under which a batch that fails is logged.

        Raises:
            ServiceError: the refusals of `check_room`.
        """
        self.check_room(places, timeout_s)
        if not self._places.take(places):  # another process was faster
            full = self._full(self._places.held)
            self._metrics.rejected[full.reason].inc()
            raise full.error
        since = asyncio.get_running_loop().time()
        return Admission(places, self._release, self._forecast, since, request_id)

    def _full(self, held: int) -> Refusal:
        full = f"the queue holds {held} of {self._places.limit} images"
        return Refusal("queue_full", Overloaded(full, retry_after_s=self.wait_estimate_s))

    def _release(self, places: int) -> None:
        self._places.give_back(places)
        self._released()
