"""Statistics are read from the metrics; many who ask at once are answered by few readings."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric

from service.errors import Cancelled, EngineFailed, InvalidRequest, Overloaded, ServiceError
from service.metrics.replica import Metrics
from service.tasks.statistics import Statistics, statistics

FAILURES = [InvalidRequest("x"), Overloaded("x", 1.0), EngineFailed("x"), Cancelled("x")]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.one_of(st.none(), st.sampled_from(FAILURES)), max_size=20),
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 3)), max_size=20),
)
def test_what_was_counted_is_what_is_told(requests, batches):
    metrics = Metrics(CollectorRegistry())
    of_m = metrics.add_model("m", "1", "classify", 8)
    of_m.show(float, float, float)
    metrics.add_model("other", "1", "classify", 8).images.inc()
    for failure in requests:
        with suppress(ServiceError), metrics.requests.count("classify", "http") as counted:
            counted.model = "m"
            if failure is not None:
                raise failure
    for size, seconds in batches:
        of_m.batch_took(size, seconds)
        of_m.images.inc(size)
        for _ in range(size):
            of_m.stage["queue"].observe(seconds)
    found = statistics(metrics.registry.collect())
    assert set(found) == {"m", "other"}
    told = found["m"]
    failed = sum(one is not None for one in requests)
    assert (told.success.count, told.fail.count) == (len(requests) - failed, failed)
    assert (told.last_request_ms > 0) == bool(requests)
    sizes = [size for size, _ in batches]
    assert (told.images, told.batches) == (sum(sizes), len(sizes))
    assert {size: spent.count for size, spent in told.sizes.items()} == {
        size: sizes.count(size) for size in sorted(set(sizes))
    }
    # Each image has the time of its batch.
    total_ns = sum(size * seconds for size, seconds in batches) * 1e9
    assert abs(told.compute.ns - total_ns) <= 1e-6 * total_ns + sum(sizes)
    counts = {one.count for one in (told.queue, told.decode, told.compute, told.postprocess)}
    assert counts == {told.images}  # clients of Triton insist on that
    assert (found["other"].images, found["other"].batches) == (1, 0)


async def test_many_who_ask_at_once_are_answered_by_few_readings():
    metrics = Metrics(CollectorRegistry())
    images = metrics.add_model("m", "1", "classify", 8).images
    readings, first, began, lock = 0, asyncio.Event(), asyncio.Event(), Lock()
    loop = asyncio.get_running_loop()

    def collect() -> Iterable[Metric]:
        nonlocal readings
        with lock:
            readings += 1
            found = list(metrics.registry.collect())
            if readings == 1:
                loop.call_soon_threadsafe(began.set)
                asyncio.run_coroutine_threadsafe(first.wait(), loop).result()
        return found

    asked = Statistics(collect)
    early = asyncio.create_task(asked.read())
    await began.wait()
    images.inc()
    late = [asyncio.create_task(asked.read()) for _ in range(50)]
    await asyncio.sleep(0)
    left = late.pop()
    left.cancel()  # nobody else is harmed
    first.set()
    assert (await early)["m"].images == 0
    assert {found["m"].images for found in await asyncio.gather(*late)} == {1}
    assert readings == 2
