"""What is counted of requests, and what became of them and of their images."""

from asyncio import CancelledError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from time import perf_counter, time
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.errors import (
    Cancelled,
    DecodeFailure,
    Internal,
    Outcome,
    ServiceError,
    all_errors,
)

Protocol = Literal["http", "grpc", "stream"]
Rejection = Literal["queue_full", "too_late", "draining", "not_ready", "engine_unavailable"]

_REQUEST_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25,
    0.5, 1, 2.5, 5, 10,
)  # fmt: skip

# The requests for pictures, which models of several tasks answer.
VISUALIZE = "visualize"

_OK: Outcome = "ok"
_UNKNOWN = "_unknown"  # the model of a request that named none that is served, or was not read


@dataclass
class CountedRequest:
    """A request on its way; whoever finds out more of it writes that here.

    Attributes:
        model: its name.
        images: how many it has.
        outcomes: what became of each of them, once that is known.
    """

    model: str = _UNKNOWN
    images: int = 0
    outcomes: Sequence[object] = ()


class RequestMetrics:
    """The instruments of requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests_vector = Counter(
            "dat_requests",
            "Requests by how they ended.",
            ["model", "version", "task", "protocol", "outcome"],
            registry=registry,
        )
        self._duration_vector = Histogram(
            "dat_request_duration_seconds",
            "From the head of a request to its answer.",
            ["model", "protocol"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._seconds_vector = Counter(
            "dat_request_seconds",
            "Time from the heads of requests to their answers, by how they ended.",
            ["model", "outcome"],
            registry=registry,
        )
        self._last_vector = Gauge(
            "dat_model_last_request_timestamp_seconds",
            "When a request for the model was answered last; 0 where none was.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._requests: dict[tuple[str, str, Protocol, Outcome], Counter] = {}
        self._duration: dict[tuple[str, Protocol], Histogram] = {}
        self._seconds: dict[tuple[str, Outcome], Counter] = {}
        self._last: dict[str, Gauge] = {}
        self._images_vector = Counter(
            "dat_image_outcomes",
            "Images of requests by what became of each, with the code that its caller saw.",
            ["model", "task", "outcome", "code"],
            registry=registry,
        )
        self._images: dict[tuple[str, str, str], Counter] = {}
        rejected = Counter(
            "dat_requests_rejected",
            "Requests refused because of the replica's state.",
            ["reason"],
            registry=registry,
        )
        self.rejected = {reason: rejected.labels(reason) for reason in get_args(Rejection)}
        in_flight = Gauge(
            "dat_requests_in_flight",
            "Requests received and not yet answered.",
            ["protocol"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._in_flight = {p: in_flight.labels(p) for p in get_args(Protocol)}
        decode_errors = Counter(
            "dat_image_decode_errors",
            "Images that could not be decoded.",
            ["reason"],
            registry=registry,
        )
        self.decode_errors = {r: decode_errors.labels(r) for r in get_args(DecodeFailure)}

    def add_task(self, task: str) -> None:
        """Count the requests of one more task whose model is not known."""
        self._bind(_UNKNOWN, "", task)

    def add_model(self, name: str, version: str, task: str) -> None:
        """Count the requests of one more model, or leave them with the version that they have."""
        if (name, task, "ok") not in self._images:
            self.bind_model(name, version, task)

    def bind_model(self, name: str, version: str, task: str) -> None:
        """Count the requests of a model for one of its versions from now on."""
        self._bind(name, version, task, VISUALIZE)

    def _bind(self, model: str, version: str, *tasks: str) -> None:
        codes = {error.code: error.outcome for error in all_errors()}
        for task, (code, outcome) in product(tasks, [("ok", _OK), *codes.items()]):
            self._images[model, task, code] = self._images_vector.labels(model, task, outcome, code)
        for protocol in get_args(Protocol):
            self._duration[model, protocol] = self._duration_vector.labels(model, protocol)
            for task, outcome in product(tasks, get_args(Outcome)):
                self._requests[model, task, protocol, outcome] = self._requests_vector.labels(
                    model, version, task, protocol, outcome
                )
        for outcome in get_args(Outcome):
            self._seconds[model, outcome] = self._seconds_vector.labels(model, outcome)
        self._last[model] = self._last_vector.labels(model)

    def turned_away(
        self, task: str, model: str | None, reason: Rejection, error: ServiceError
    ) -> None:
        """Count a request of one image that came over HTTP and was refused by its head.

        Args:
            task: of the request.
            model: that would have answered it; `None` where that is not known.
            reason: that it is refused for.
            error: that its caller is told.
        """
        name = model or _UNKNOWN
        self.rejected[reason].inc()
        self._requests[name, task, "http", error.outcome].inc()
        self._images[name, task, error.code].inc()
        self._duration[name, "http"].observe(0.0)

    @contextmanager
    def count(self, task: str, protocol: Protocol) -> Iterator[CountedRequest]:
        """Count one request, its time and what became of it and of its images, whatever that is."""
        start, counted = perf_counter(), CountedRequest()
        failure: ServiceError | None = None
        self._in_flight[protocol].inc()
        try:
            yield counted
        except ServiceError as error:
            failure = error
            raise
        except CancelledError:  # gRPC cancels the handler's task when the caller leaves
            failure = Cancelled("the caller left")
            raise
        except Exception:
            failure = Internal("internal error")
            raise
        finally:
            self._in_flight[protocol].dec()
            if failure is None:
                failures = [one for one in counted.outcomes if isinstance(one, ServiceError)]
                for failed in failures:
                    self._images[counted.model, task, failed.code].inc()
                self._images[counted.model, task, _OK].inc(counted.images - len(failures))
                if failures and len(failures) == counted.images:
                    failure = failures[0]
            else:
                self._images[counted.model, task, failure.code].inc(counted.images)
            outcome: Outcome = _OK if failure is None else failure.outcome
            self._requests[counted.model, task, protocol, outcome].inc()
            took_s = perf_counter() - start
            self._duration[counted.model, protocol].observe(took_s)
            self._seconds[counted.model, outcome].inc(took_s)
            self._last[counted.model].set(time())
