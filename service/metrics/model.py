"""What is counted of each model: its images, batches, queue and devices."""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from service.errors import BatchFailure
from service.metrics.requests import RequestMetrics
from service.priority import Priority

Stage = Literal["decode", "queue", "compute", "postprocess", "render"]
Explanation = Literal["points", "objects", "attention"]
Trigger = Literal["full", "idle"]
LoadPhase = Literal["read", "build", "warmup"]
Part = Literal["weights", "graphs"]

_STAGE_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5,
    1, 2.5,
)  # fmt: skip
# The edges are where a forecast is wrong by 5, 10, 15, 20, 30, 50 % of what it took, and by more.
_TOOK_TO_FORETOLD = (
    0.25, 0.5, 0.667, 0.769, 0.833, 0.87, 0.909, 0.952, 1.0, 1.053, 1.111, 1.176, 1.25, 1.429, 2.0,
    4.0,
)  # fmt: skip


class ModelVectors:
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
    """The instruments of one model, and those of all requests that count for it.

    Counters of all versions are the same; what is of one version alone is seen between `show` and
    `hide`.

    Attributes:
        model: its name.
    """

    def __init__(
        self,
        requests: RequestMetrics,
        vectors: ModelVectors,
        *,
        name: str,
        model_version: str,
        task: str,
        capacity: int,
        devices: Sequence[str],
    ) -> None:
        self.model = name
        self._requests, self._version, self._task = requests, model_version, task
        self._limit = capacity
        self.rejected = requests.rejected
        self.decode_errors = requests.decode_errors
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
            wait_estimate_s: time in which those that wait now will have their answers, seconds.
        """
        self._requests.bind_model(self.model, self._version, self._task)
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
