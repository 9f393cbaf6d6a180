"""Which requests are admitted: places in the queue of a model, and why there are none."""

import asyncio
from collections.abc import Callable
from math import inf
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from prometheus_client import Histogram

from service.batching.forecast import UNKNOWN, Expected, Forecast
from service.errors import Draining, EngineUnavailable, NotReady, Overloaded, ServiceError
from service.metrics.model import ModelMetrics
from service.metrics.requests import Rejection
from service.priority import Priority, fits

# A forecast that is too short costs the work of a caller that leaves; one that is too long turns
# away a caller that would have got its answer.
_MARGIN = 1.2
# Where requests are read so late, more come than can be read, whatever waits for the devices.
_LATE_S = 0.02
# A request of the lower class counts as one of the upper class when it has waited so many times as
# long as all that came before it would have taken, and at least so many seconds: while nothing but
# the lower class comes, none of it gets in the way of the upper one.
_AGES = 2.0
_AGES_S = 1.0


class Count(NamedTuple):
    """How many places of a queue are in use, and how many items are on a device.

    Attributes:
        held: places that were given out and not given back.
        held_low: those of them that requests of the lower class have.
        running: items on a device.
    """

    held: int
    held_low: int
    running: int

    def fits(self, wanted: int, priority: Priority, limit: int) -> bool:
        """Whether a request of that class may take so many places more; see `priority.fits`."""
        return fits(wanted, priority, held=self.held, held_low=self.held_low, limit=limit)


class Places(Protocol):
    """The places of a queue, and how many items are on a device."""

    @property
    def limit(self) -> int:
        """Most places that are given out at a time."""

    def count(self) -> "Count":
        """What is held and what runs."""

    def take(self, places: int, priority: Priority) -> bool:
        """Give out places, all or none, and say whether they were free; see `fits`."""

    def give_back(self, places: int, priority: Priority) -> None:
        """Take places back that were given to a request of that class."""

    def changed_running(self, items: int) -> None:
        """Count items that went to a device, or with a negative number came back."""


class LocalPlaces:
    """The places of a queue that one process has for itself.

    Args:
        limit: as in `Places`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = Count(0, 0, 0)

    def count(self) -> Count:
        """What is held and what runs."""
        return self._count

    def take(self, places: int, priority: Priority) -> bool:
        """Give out places, all or none, and say whether they were free."""
        if not self._count.fits(places, priority, self.limit):
            return False
        self._change(places, priority)
        return True

    def give_back(self, places: int, priority: Priority) -> None:
        """Take places back that were given to a request of that class."""
        self._change(-places, priority)

    def changed_running(self, items: int) -> None:
        """Count items that went to a device, or with a negative number came back."""
        held, held_low, running = self._count
        self._count = Count(held, held_low, running + items)

    def _change(self, places: int, priority: Priority) -> None:
        held, held_low, running = self._count
        low = places if priority == "low" else 0
        self._count = Count(held + places, held_low + low, running)


class Admission:
    """Places in the queue for the items of one request.

    A place is held from admission, through decoding and the queue, until the item goes to the
    device or is given up; the end of the context gives back what is left.

    Attributes:
        since: when the caller asked, as far as is known, loop time, seconds.
        request_id: of the request whose places these are.
        priority: the class of the request.
        due: from when on the request counts as one of the upper class, loop time, seconds.
    """

    def __init__(  # noqa: PLR0917
        self,
        places: int,
        release: Callable[[int, Priority], None],
        forecast: Forecast,
        lag_s: float,
        request_id: str = "",
        priority: Priority = "high",
        expected: Expected = UNKNOWN,
    ) -> None:
        self._given_at = asyncio.get_running_loop().time()
        self.since = self._given_at - lag_s
        self.request_id = request_id
        self.priority = priority
        ages_s = 0.0 if priority == "high" else max(_AGES_S, _AGES * expected.seconds)
        self.due = self.since + ages_s
        self._places = places
        self._release = release
        self._forecast = forecast
        self._expected = expected

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_back(self._places)
        age_s = asyncio.get_running_loop().time() - self.since
        if kind is asyncio.CancelledError:
            self._forecast.caller_left(age_s)
        else:
            self._forecast.caller_answered(age_s)

    @property
    def patient_until(self) -> float:
        """When its caller, as callers are, will have left; loop time, seconds."""
        return self.since + self._forecast.patience_s

    def all_answered(self, ratio: Histogram) -> None:
        """Note that every item has its result.

        Args:
            ratio: of the time that took to the time that was foretold.
        """
        took_s = asyncio.get_running_loop().time() - self._given_at
        self._forecast.answered(self._expected, took_s)
        if self._expected.seconds:
            ratio.observe(took_s / self._expected.seconds)

    def give_back(self, places: int = 1) -> None:
        """Give back places that are no longer needed."""
        self.forget(places)
        self._release(places, self.priority)

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
        """Places that were given out here and not given back; a worker gives none out."""
        return self._places.count().held if self._places.limit else 0

    @property
    def wait_estimate_s(self) -> float:
        """Time in which everything admitted so far will have its answer, seconds."""
        count = self._places.count()
        return self._forecast.expect(count.held, count.running).seconds

    def open(self) -> None:
        """Begin to admit, and show it in the metrics."""
        self._open = True
        self.show()

    def show(self) -> None:
        """Let the metrics show this queue from now on."""
        self._metrics.show(
            lambda: self._places.count().held,
            lambda: self._places.count().running,
            lambda: self.wait_estimate_s,
        )

    def drain(self) -> None:
        """Admit nothing any more."""
        self._draining = True

    def refusal(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Refusal | None:
        """Why so many places could not be taken now, if so; asking counts nowhere.

        Args:
            places: that are wanted.
            timeout_s: after which the answers are of no use, seconds; `None` where the caller
                did not say.
            priority: the class of the request.
            decode_s: until its images are decoded, as far as is known, seconds.
        """
        return self._judge(places, timeout_s, priority, decode_s)[0]

    def _judge(
        self, places: int, timeout_s: float | None, priority: Priority, decode_s: float
    ) -> tuple[Refusal | None, Expected]:
        """Why a request is refused, if it is, and when it would have its answers."""
        if (closed := self._closed()) is not None:
            return closed, UNKNOWN
        count = self._places.count()
        if not count.fits(places, priority, self._places.limit):
            return self._full(count, priority), UNKNOWN
        # Few of the lower class are old enough to count as upper ones.
        ahead = count.held if priority == "low" else count.held - count.held_low
        expected = self._forecast.expect(ahead + places, count.running, decode_s)
        lag_s = self._forecast.lag_s
        # With nothing ahead the forecast is put to the test.
        if ahead or count.running or lag_s > _LATE_S:
            wanted_s = inf if timeout_s is None else timeout_s
            patience_s = min(self._forecast.patience_s, wanted_s)
            answer_s = lag_s + _MARGIN * expected.seconds
            if answer_s > patience_s:
                late = f"the answer would take {answer_s:.2g} s, and " + (
                    f"callers have left after {patience_s:.2g} s of late"
                    if patience_s < wanted_s
                    else f"is wanted in {patience_s:.2g} s"
                )
                error = Overloaded(late, retry_after_s=answer_s - patience_s)
                return Refusal("too_late", error), expected
        return None, expected

    def _closed(self) -> Refusal | None:
        """Why nothing at all is admitted now, if so."""
        if self._draining:
            return Refusal("draining", Draining("this replica is draining"))
        if not self._open:
            return Refusal("not_ready", NotReady("this replica is starting"))
        if (unavailable := self._unavailable()) is not None:
            return Refusal("engine_unavailable", unavailable)
        return None

    def check_room(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> None:
        """Refuse what could not be admitted now; the arguments are those of `refusal`.

        Raises:
            NotReady: the replica does not admit yet.
            Draining: the replica no longer admits.
            EngineUnavailable: no device is left, or the model fails again and again.
            Overloaded: fewer places are free, or the answers would come too late.
        """
        self._refuse(self.refusal(places, timeout_s, priority, decode_s))

    def admit(
        self,
        places: int,
        timeout_s: float | None = None,
        request_id: str = "",
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Admission:
        """Take places in the queue for a request, all or none.

        Args:
            places: as in `refusal`.
            timeout_s: as in `refusal`.
            request_id: under which a batch that fails is logged.
            priority: as in `refusal`.
            decode_s: as in `refusal`.

        Raises:
            ServiceError: the refusals of `check_room`.
        """
        refusal, expected = self._judge(places, timeout_s, priority, decode_s)
        self._refuse(refusal)
        if not self._places.take(places, priority):  # another process was faster
            self._refuse(self._full(self._places.count(), priority))
        lag_s = self._forecast.lag_s
        return Admission(
            places, self._release, self._forecast, lag_s, request_id, priority, expected
        )

    def _refuse(self, refusal: Refusal | None) -> None:
        """Count a refusal, if it is one, and raise its error."""
        if refusal is not None:
            self._metrics.rejected[refusal.reason].inc()
            raise refusal.error

    def _full(self, count: Count, priority: Priority) -> Refusal:
        full = f"the queue holds {count.held} of {self._places.limit} images"
        if priority == "low":
            full += f", {count.held_low} of them of low priority, which has a share of it"
        return Refusal("queue_full", Overloaded(full, retry_after_s=self.wait_estimate_s))

    def _release(self, places: int, priority: Priority) -> None:
        self._places.give_back(places, priority)
        self._released()
