"""What is counted of the whole replica: its transports, keys, files and process."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from service.metrics.model import ModelMetrics, ModelVectors
from service.metrics.requests import Protocol, RequestMetrics

Reload = Literal["added", "reloaded", "removed", "failed"]
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

_BODY_BYTES = tuple(float(1024 * 4**n) for n in range(9))
_LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The instruments of one replica; those of its models are in `ModelMetrics`.

    Attributes:
        registry: that shows them.
        requests: what is counted of requests.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self._vectors = ModelVectors(registry)
        self.requests = RequestMetrics(registry)

        self.responses = Counter(
            "dat_responses",
            "Responses by the code that the protocol showed.",
            ["protocol", "code"],
            registry=registry,
        )
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

    def add_model(
        self,
        name: str,
        model_version: str,
        task: str,
        capacity: int,
        devices: Sequence[str] = ("cpu:0",),
    ) -> ModelMetrics:
        """The instruments of one more model, or of another version of one.

        Gauges show the version that `ModelMetrics.show` was called for last.

        Args:
            name: of the model.
            model_version: of the model.
            task: what it does.
            capacity: most images admitted and not yet on the device.
            devices: names of those that run it.
        """
        self.requests.add_model(name, model_version, task)
        return ModelMetrics(
            self.requests,
            self._vectors,
            name=name,
            model_version=model_version,
            task=task,
            capacity=capacity,
            devices=devices,
        )
