"""What a server has done for each model since its start, from the metrics that everybody sees."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Metric


@dataclass(frozen=True)
class Spent:
    """How often something was done, and the time that it took.

    Attributes:
        count: how often.
        ns: in all, nanoseconds.
    """

    count: int = 0
    ns: int = 0


@dataclass(frozen=True)
class ModelStatistics:
    """What was done for a model, in all its versions.

    What an image passes through is counted once for each that was answered, whatever shared a
    batch or failed before: as in Triton, whose clients compare these counts. perf_analyzer ends
    when they differ.

    Attributes:
        last_request_ms: when a request was answered last, milliseconds since 1970; 0: never.
        images: that were answered.
        batches: that a device computed.
        success: requests with an answer, from head to answer.
        fail: all other requests.
        decode: of the images.
        queue: likewise.
        compute: likewise, the time of its batch for each.
        postprocess: likewise.
        sizes: batches of each size, in images, that there were.
    """

    last_request_ms: int
    images: int
    batches: int
    success: Spent
    fail: Spent
    decode: Spent
    queue: Spent
    compute: Spent
    postprocess: Spent
    sizes: Mapping[int, Spent]


class Statistics:
    """Reads the statistics; what is asked while they are read is answered by one reading after it.

    Args:
        collect: the metrics of all processes; is called in another thread.
    """

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[dict[str, ModelStatistics]] | None = None

    async def read(self) -> dict[str, ModelStatistics]:
        """The statistics of every model that was ever served, by its name."""
        if self._next is None:
            self._next = asyncio.create_task(self._read())
        return await asyncio.shield(self._next)

    async def _read(self) -> dict[str, ModelStatistics]:
        async with self._turn:
            self._next = None
            return await asyncio.to_thread(lambda: statistics(self._collect()))


def statistics(families: Iterable[Metric]) -> dict[str, ModelStatistics]:
    """The statistics of every model, by its name, from the metrics."""
    # By the name of the sample, the model, and the one label that matters here.
    sums = defaultdict[tuple[str, str, str], float](float)
    for family in families:
        label = _LABELS.get(family.name)
        if label is not None:
            for sample in family.samples:
                model, kind = sample.labels["model"], sample.labels.get(label, "")
                sums[sample.name, model, kind] += sample.value
    models = {model for name, model, _ in sums if name == "dat_images_total"}
    return {model: _of_model(sums, model) for model in sorted(models)}


# The metrics that are read, each with the label by which its samples are told apart.
_LABELS = {
    "dat_model_last_request_timestamp_seconds": "",
    "dat_images": "",
    "dat_batch_size": "",
    "dat_requests": "outcome",
    "dat_request_seconds": "outcome",
    "dat_stage_duration_seconds": "stage",
    "dat_batch_duration_seconds": "size",
}
_OK = "ok"


def _of_model(sums: Mapping[tuple[str, str, str], float], model: str) -> ModelStatistics:
    def total(name: str, kind: str = "") -> float:
        return sums.get((name, model, kind), 0)

    def spent(name: str, kind: str) -> Spent:
        return _spent(total(f"{name}_count", kind), total(f"{name}_sum", kind))

    kinds = {kind for name, of, kind in sums if name == "dat_requests_total" and of == model}
    failed = [
        sum(total(name, kind) for kind in kinds - {_OK})
        for name in ("dat_requests_total", "dat_request_seconds_total")
    ]
    sizes = {
        int(size): spent("dat_batch_duration_seconds", size)
        for name, of, size in sums
        if name == "dat_batch_duration_seconds_count" and of == model
    }
    images = round(total("dat_images_total"))

    def stage(name: str) -> Spent:
        return _spent(images, total("dat_stage_duration_seconds_sum", name))

    return ModelStatistics(
        last_request_ms=round(total("dat_model_last_request_timestamp_seconds") * 1e3),
        images=images,
        batches=round(total("dat_batch_size_count")),
        success=_spent(total("dat_requests_total", _OK), total("dat_request_seconds_total", _OK)),
        fail=_spent(*failed),
        decode=stage("decode"),
        queue=stage("queue"),
        compute=Spent(images, sum(size * spent.ns for size, spent in sizes.items())),
        postprocess=stage("postprocess"),
        sizes={size: sizes[size] for size in sorted(sizes) if sizes[size].count},
    )


def _spent(count: float, seconds: float) -> Spent:
    return Spent(round(count), round(seconds * 1e9))
