"""Every Prometheus instrument of the server.

Names, labels and buckets follow one rule: an application prefix, base units, bounded labels,
and every label combination present from the start. Images are counted, not requests, wherever
the queue or the device is meant.
"""

from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from time import perf_counter, time
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from service.errors import (
    BatchFailure,
    Cancelled,
    DecodeFailure,
    Internal,
    Outcome,
    ServiceError,
    all_errors,
)
from service.priority import Priority

Protocol = Literal["http", "grpc", "stream"]
Stage = Literal["decode", "queue", "compute", "postprocess", "render"]
Explanation = Literal["points", "objects", "attention"]
Rejection = Literal["queue_full", "too_late", "draining", "not_ready", "engine_unavailable"]
Trigger = Literal["full", "idle"]
LoadPhase = Literal["read", "build", "warmup"]
Reload = Literal["added", "reloaded", "removed", "failed"]
Part = Literal["weights", "graphs"]
Port = Literal["http", "metrics"]
Cut = Literal[
    "header_timeout",
    "body_timeout",
    "write_timeout",
    "idle",
    "evicted",
    "crowded",
    "handshake",
    "left",
    "unread",
]
Reloaded = Literal["keys", "certificates"]

_REQUEST_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25,
    0.5, 1, 2.5, 5, 10,
)  # fmt: skip
_STAGE_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5,
    1, 2.5,
)  # fmt: skip
_BODY_BYTES = tuple(float(1024 * 4**n) for n in range(9))
# The edges are where a forecast is wrong by 5, 10, 15, 20, 30, 50 % of what it took, and by more.
_TOOK_TO_FORETOLD = (
    0.25, 0.5, 0.667, 0.769, 0.833, 0.87, 0.909, 0.952, 1.0, 1.053, 1.111, 1.176, 1.25, 1.429, 2.0,
    4.0,
)  # fmt: skip
_LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


# The requests for pictures, which models of several tasks answer.
VISUALIZE = "visualize"

_OK: Outcome = "ok"
_UNKNOWN = "_unknown"  # the model of a request that named none that is served, or was not read


class Metrics:
    """The instruments of one replica; those of its models are in `ModelMetrics`.

    Children are bound once, so that counting costs no look-up by label.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self._vectors = _ModelVectors(registry)

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
        self.responses = Counter(
            "dat_responses",
            "Responses by the code that the protocol showed.",
            ["protocol", "code"],
            registry=registry,
        )
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
        body = Histogram(
            "dat_request_body_bytes",
            "Size of request bodies and messages.",
            ["protocol"],
            buckets=_BODY_BYTES,
            registry=registry,
        )
        self.body_bytes = {p: body.labels(p) for p in get_args(Protocol)}
        self.bytes_in_flight = Gauge(
            "dat_request_bytes_in_flight",
            "Bytes of requests that are received and not yet decoded.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.pixels_in_flight = Gauge(
            "dat_image_pixels_in_flight",
            "Pixels of images that are admitted and not yet decoded.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        connections = Gauge(
            "dat_connections",
            "Open HTTP connections.",
            ["port"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.connections = {port: connections.labels(port) for port in get_args(Port)}
        cut = Counter(
            "dat_connections_cut",
            "HTTP connections that the server ended because of their client or for want of room; "
            "`left`: the client had closed it before its request was read.",
            ["port", "reason"],
            registry=registry,
        )
        self.connections_cut: dict[Port, dict[Cut, Counter]] = {
            port: {reason: cut.labels(port, reason) for reason in get_args(Cut)}
            for port in get_args(Port)
        }
        self.key_images = Counter(
            "dat_key_images",
            "Images that were asked for with a key, and not refused because of it.",
            ["key"],
            registry=registry,
        )
        self.key_refused = Counter(
            "dat_key_requests_refused",
            "Requests refused because of their key, by the code that their caller saw.",
            ["key", "code"],
            registry=registry,
        )
        reloads = Counter(
            "dat_security_reloads",
            "Changes of the files of keys and certificates: those in use since, and those that "
            "cannot be used.",
            ["kind", "outcome"],
            registry=registry,
        )
        self.reloads = {
            kind: {outcome: reloads.labels(kind, outcome) for outcome in ("ok", "failed")}
            for kind in get_args(Reloaded)
        }
        self.certificate_expiry = Gauge(
            "dat_certificate_expiry_timestamp_seconds",
            "When the certificate of the server expires; 0 without TLS.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        decode_errors = Counter(
            "dat_image_decode_errors",
            "Images that could not be decoded.",
            ["reason"],
            registry=registry,
        )
        self.decode_errors = {r: decode_errors.labels(r) for r in get_args(DecodeFailure)}
        self.draining = Gauge(
            "dat_draining",
            "1 from the signal to leave until the end.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.event_loop_lag = Histogram(
            "dat_event_loop_lag_seconds",
            "How late the event loop woke a timer.",
            buckets=_LAG_SECONDS,
            registry=registry,
        )
        self.log_lines_dropped = Counter(
            "dat_log_lines_dropped",
            "Lines of the log that nobody read in time.",
            registry=registry,
        )
        model_reloads = Counter(
            "dat_model_reloads",
            "Models that a reload of the server changed, or could not change.",
            ["outcome"],
            registry=registry,
        )
        self.model_reloads = {
            outcome: model_reloads.labels(outcome) for outcome in get_args(Reload)
        }
        Gauge(
            "dat_build_info",
            "What this replica is made of; the version of torch names its CUDA.",
            ["version", "torch"],
            registry=registry,
            multiprocess_mode="livemax",
        ).labels(version("dat-serve"), version("torch")).set(1)

    def add_task(self, task: str) -> None:
        """Count the requests of one more task whose model is not known."""
        self.bind_requests(_UNKNOWN, "", task)

    def add_model(
        self,
        name: str,
        model_version: str,
        task: str,
        capacity: int,
        devices: Sequence[str] = ("cpu:0",),
    ) -> "ModelMetrics":
        """The instruments of one more model, or of another version of one.

        Gauges show the version that `ModelMetrics.show` was called for last.

        Args:
            name: of the model.
            model_version: of the model.
            task: what it does.
            capacity: most images admitted and not yet on the device.
            devices: names of those that run it.
        """
        if (name, task, "ok") not in self._images:
            self.bind_requests(name, model_version, task, VISUALIZE)
        return ModelMetrics(
            self,
            self._vectors,
            name=name,
            model_version=model_version,
            task=task,
            capacity=capacity,
            devices=devices,
        )

    def bind_requests(self, model: str, model_version: str, *tasks: str) -> None:
        """Count the requests of a model for one of its versions from now on."""
        codes = {error.code: error.outcome for error in all_errors()}
        for task, (code, outcome) in product(tasks, [("ok", _OK), *codes.items()]):
            self._images[model, task, code] = self._images_vector.labels(model, task, outcome, code)
        for protocol in get_args(Protocol):
            self._duration[model, protocol] = self._duration_vector.labels(model, protocol)
            for task, outcome in product(tasks, get_args(Outcome)):
                self._requests[model, task, protocol, outcome] = self._requests_vector.labels(
                    model, model_version, task, protocol, outcome
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
    def request(self, task: str, protocol: Protocol) -> Iterator["CountedRequest"]:
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


class _ModelVectors:
    """The instruments that have a child for each model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stage = Histogram(
            "dat_stage_duration_seconds",
            "Time of one image in each stage; compute is that of its whole batch.",
            ["model", "stage"],
            buckets=_STAGE_SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "dat_images", "Images answered.", ["model", "task"], registry=registry
        )
        self.explained = Counter(
            "dat_explain_requests",
            "Requests that asked where the model looked.",
            ["model", "kind"],
            registry=registry,
        )
        self.batches = Counter(
            "dat_batches",
            "Batches by why they left: full, or the device was idle.",
            ["model", "trigger"],
            registry=registry,
        )
        self.batch_failures = Counter(
            "dat_batch_failures",
            "Runs that failed, of batches and of parts of them that were tried again, by cause.",
            ["model", "cause"],
            registry=registry,
        )
        self.failing = Gauge(
            "dat_model_failing",
            "1 while the model is out of use because it fails again and again.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.batch_size = Histogram(
            "dat_batch_size",
            "Images in a batch, without padding.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.batch_seconds = Summary(
            "dat_batch_duration_seconds",
            "Time in which the device computed batches of so many images.",
            ["model", "size"],
            registry=registry,
        )
        self.batch_images = Counter(
            "dat_batch_images",
            "Rows that the device computed: images, and padding up to the bucket.",
            ["model", "kind"],
            registry=registry,
        )
        self.replays = Counter(
            "dat_graph_replays",
            "Batches run by replaying a captured graph, or eagerly.",
            ["model", "mode"],
            registry=registry,
        )
        self.captures = Counter(
            "dat_graph_captures",
            "CUDA graphs captured, at the start or on demand, and attempts that failed.",
            ["model", "outcome"],
            registry=registry,
        )
        self.graphs = Gauge(
            "dat_graphs",
            "CUDA graphs in memory.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.engine_info = Gauge(
            "dat_model_engine_info",
            "What computes the model on a device, and why not otherwise.",
            ["model", "device", "hardware", "backend", "dtype", "kernels", "tf32"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.memory = Gauge(
            "dat_model_memory_bytes",
            "Memory of the device that holds the parameters of the model, and its CUDA graphs.",
            ["model", "device", "part"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.busy_seconds = Counter(
            "dat_device_busy_seconds",
            "Time in which the device computed a batch of the model; the sum of the rates over "
            "the models is the saturation of the device.",
            ["model", "device"],
            registry=registry,
        )
        self.abandoned = Counter(
            "dat_images_abandoned",
            "Images that the device computed for callers that had left or could not wait.",
            ["model"],
            registry=registry,
        )
        self.waiting = Gauge(
            "dat_requests_waiting",
            "Images admitted and not yet on the device.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.running = Gauge(
            "dat_requests_running",
            "Images on the device.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.capacity = Gauge(
            "dat_queue_capacity_requests",
            "Most images admitted and not yet on the device.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.wait_estimate = Gauge(
            "dat_queue_wait_estimate_seconds",
            "Time in which the images that wait now will have their answers.",
            ["model"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.foretold = Histogram(
            "dat_answer_time_ratio",
            "Time from admission to the answers, of the time that was foretold at admission.",
            ["model", "priority"],
            buckets=_TOOK_TO_FORETOLD,
            registry=registry,
        )
        self.ready = Gauge(
            "dat_model_ready",
            "1 when warmed up, while a device can run it and it does not fail again and again.",
            ["model", "version"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.load = Gauge(
            "dat_model_load_duration_seconds",
            "Time of each phase of loading.",
            ["model", "phase"],
            registry=registry,
            multiprocess_mode="livemax",
        )


class ModelMetrics:
    """The instruments of one model, and those of the replica that count for it.

    Counters of all versions are the same; what is of one version alone is seen between `show` and
    `hide`.

    Attributes:
        model: its name.
    """

    def __init__(
        self,
        replica: Metrics,
        vectors: _ModelVectors,
        *,
        name: str,
        model_version: str,
        task: str,
        capacity: int,
        devices: Sequence[str],
    ) -> None:
        self.model = name
        self._count_requests = partial(replica.bind_requests, name, model_version, task, VISUALIZE)
        self._limit = capacity
        self.rejected = replica.rejected
        self.decode_errors = replica.decode_errors
        self.stage = {stage: vectors.stage.labels(name, stage) for stage in get_args(Stage)}
        self.images = vectors.images.labels(name, task)
        self.explained = {
            kind: vectors.explained.labels(name, kind) for kind in get_args(Explanation)
        }
        self.batches = {t: vectors.batches.labels(name, t) for t in get_args(Trigger)}
        self.batch_failures = {
            cause: vectors.batch_failures.labels(name, cause) for cause in get_args(BatchFailure)
        }
        self.failing = vectors.failing.labels(name)
        self.batch_size = vectors.batch_size.labels(name)
        self._batch_seconds = vectors.batch_seconds
        self._of_size = {1: vectors.batch_seconds.labels(name, "1")}
        self.real_rows = vectors.batch_images.labels(name, "real")
        self.padding_rows = vectors.batch_images.labels(name, "padding")
        self.replays = {mode: vectors.replays.labels(name, mode) for mode in ("graph", "eager")}
        self.captures = {o: vectors.captures.labels(name, o) for o in ("ok", "failed")}
        self.graphs = vectors.graphs.labels(name)
        self._engine_info = vectors.engine_info
        self._info: list[Gauge] = []
        self._weights: dict[str, tuple[Gauge, int]] = {}
        self._memory = vectors.memory
        for device in devices:
            for part in get_args(Part):
                self.memory(device, part)
        self.busy_seconds = [vectors.busy_seconds.labels(name, device) for device in devices]
        self.abandoned = vectors.abandoned.labels(name)
        self.waiting = vectors.waiting.labels(name)
        self.running = vectors.running.labels(name)
        self._capacity = vectors.capacity.labels(name)
        self.wait_estimate = vectors.wait_estimate.labels(name)
        self.foretold = {p: vectors.foretold.labels(name, p) for p in get_args(Priority)}
        self.ready = vectors.ready.labels(name, model_version)
        self.load_seconds = {p: vectors.load.labels(name, p) for p in get_args(LoadPhase)}

    def show(
        self,
        held: Callable[[], float],
        running: Callable[[], float],
        wait_estimate_s: Callable[[], float],
    ) -> None:
        """Show this version, and count requests for it.

        Args:
            held: images admitted and not yet on the device.
            running: images on the device.
            wait_estimate_s: time in which those will have reached it, seconds.
        """
        self._count_requests()
        self._capacity.set(self._limit)
        self.failing.set(0)
        # Asked for when somebody reads the metrics: these change with every image.
        self.waiting.set_function(held)
        self.running.set_function(running)
        self.wait_estimate.set_function(wait_estimate_s)
        for info in self._info:
            info.set(1)
        for gauge, size in self._weights.values():
            gauge.set(size)

    def hide(self) -> None:
        """Let the gauges of this version be 0."""
        for gauge in (self.waiting, self.running, self.wait_estimate):
            gauge.set_function(_none)
        for gauge in (self._capacity, self.failing, self.ready, *self._info):
            gauge.set(0)
        for gauge, _ in self._weights.values():
            gauge.set(0)

    def forget(self) -> None:
        """Let all gauges of the model be 0: no version of it is served any more."""
        self.hide()
        for gauge in self.load_seconds.values():
            gauge.set(0)

    def batch_took(self, size: int, seconds: float) -> None:
        """Count a batch of so many images that the device computed, and its time."""
        if size not in self._of_size:
            self._of_size[size] = self._batch_seconds.labels(self.model, str(size))
        self._of_size[size].observe(seconds)
        self.batch_size.observe(size)
        self.stage["compute"].observe(seconds)

    def memory(self, device: str, part: Part) -> Gauge:
        """Bytes of one of the devices that a part of the model takes."""
        return self._memory.labels(self.model, device, part)

    def engine_is(self, weights_bytes: int, *, device: str, **labels: str) -> None:
        """Tell what computes the model on one of the devices.

        Args:
            weights_bytes: memory of that device which holds the parameters.
            device: its name.
            **labels: others of `dat_model_engine_info`, without the model.
        """
        self._info.append(self._engine_info.labels(model=self.model, device=device, **labels))
        self._weights[device] = self.memory(device, "weights"), weights_bytes


def _none() -> float:
    return 0.0
