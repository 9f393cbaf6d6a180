import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.batching.admission import LocalPlaces
from service.batching.batcher import Batcher
from service.batching.breaker import SUSPECT_AFTER, Fit
from service.batching.dispatch import Dispatch
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineUnavailable,
    NotReady,
    OutOfMemory,
    Overloaded,
)
from service.metrics.replica import Metrics
from service.share import Share

FAR = 1e9  # loop time, seconds


@dataclass
class Seat:
    """What the dispatch knows of a device."""

    depth: int = 1
    healthy: bool = True
    cores: int = 1


@dataclass
class Runner:
    """A runner of a whole device, with nothing to do after a batch."""

    work: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]
    max_batch: int = 4

    def share(self, in_flight: int, free: int) -> Share:
        return Share(1, self.max_batch)

    async def run_batch(self, batch: Sequence[Any], cores: int) -> Sequence[Any]:
        assert cores == 1
        return await self.work(batch)

    async def settle(self) -> None:
        pass

    def describe(self, size: int) -> dict[str, object]:
        return {"model": "recorded", "bucket": size}

    async def probe(self, cores: int) -> None:
        pass


def opened(*run_batch, max_batch=4, queue_limit=100, dispatch=None, **settings):
    """A batcher over one runner for each function."""
    names = [f"cpu:{index}" for index in range(len(run_batch))]
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "classify", queue_limit, names)
    runners = [one if hasattr(one, "settle") else Runner(one) for one in run_batch]
    for runner in runners:
        runner.max_batch = max_batch
    batcher = Batcher(
        runners,
        max_batch=max_batch,
        places=LocalPlaces(queue_limit),
        metrics=metrics,
        dispatch=dispatch or Dispatch([Seat() for _ in run_batch]),
        **settings,
    )
    batcher.open()
    return batcher, metrics


def whole(device: int, free: int) -> Share:
    return Share(1, 4)


def value(gauge):
    """What somebody who reads the metrics would see."""
    (family,) = gauge.collect()
    return family.samples[0].value


async def submit(batcher, item, deadline=FAR):
    with batcher.admit(1) as admission:
        return (await batcher.submit(item, admission, deadline)).result


class Device:
    """Doubles its items, keeps the batches it saw, and can be held."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.started = asyncio.Event()
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.started.set()
        await self.free.wait()
        return [2 * item for item in items]


async def test_a_batch_leaves_at_once_when_the_device_is_free():
    device = Device()
    batcher, _ = opened(device)
    run = asyncio.create_task(batcher.run())

    assert await submit(batcher, 1) == 2
    assert device.batches == [[1]]
    run.cancel()


async def test_what_waits_while_the_device_is_busy_leaves_together():
    device = Device()
    batcher, _ = opened(device, max_batch=3)
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    first = asyncio.create_task(submit(batcher, 0))
    await device.started.wait()
    rest = [asyncio.create_task(submit(batcher, n)) for n in range(1, 5)]
    await asyncio.sleep(0)
    device.free.set()

    assert await asyncio.gather(first, *rest) == [0, 2, 4, 6, 8]
    assert device.batches == [[0], [1, 2, 3], [4]]
    run.cancel()


@given(st.lists(st.integers(), max_size=40), st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_every_item_gets_its_own_answer_in_order_of_arrival(items, max_batch):
    async def scenario():
        device = Device()
        batcher, _ = opened(device, max_batch=max_batch)
        run = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*(submit(batcher, item) for item in items))
        assert answers == [2 * item for item in items]
        batcher.begin_drain()
        await run
        assert [item for batch in device.batches for item in batch] == items
        assert all(len(batch) <= max_batch for batch in device.batches)

    asyncio.run(scenario())


async def test_a_caller_that_leaves_the_queue_never_reaches_the_device():
    device = Device()
    batcher, metrics = opened(device)
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    running = asyncio.create_task(submit(batcher, 0))
    await device.started.wait()
    gone, stays = (asyncio.create_task(submit(batcher, n)) for n in (1, 2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    device.free.set()

    assert await running == 0
    assert await stays == 4
    assert device.batches == [[0], [2]]
    assert value(metrics.waiting) == 0
    run.cancel()


async def test_a_caller_that_leaves_a_running_batch_harms_nobody():
    device = Device()
    batcher, _ = opened(device, max_batch=2)
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    gone = asyncio.create_task(submit(batcher, 1))
    await device.started.wait()
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    device.free.set()

    assert await submit(batcher, 2) == 4
    run.cancel()


async def test_a_deadline_in_the_queue_is_answered_and_never_reaches_the_device():
    device = Device()
    batcher, _ = opened(device)
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    running = asyncio.create_task(submit(batcher, 0))
    await device.started.wait()

    with pytest.raises(DeadlineExceeded):
        await submit(batcher, 1, asyncio.get_running_loop().time() + 0.001)
    device.free.set()
    await running
    assert await submit(batcher, 2) == 4
    assert device.batches == [[0], [2]]
    run.cancel()


async def test_whoever_has_hardly_any_time_left_makes_way_and_goes_when_nobody_else_waits():
    device = Device()
    batcher, _ = opened(device, max_batch=8)
    for size in (1, 8):
        batcher.forecast.batch_ended(size, 60.0, 60.0, crowded=True)
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    busy = asyncio.create_task(submit(batcher, 1))
    await device.started.wait()
    with batcher.admit(1) as admission:
        admission.since -= 60.0
        in_s = asyncio.get_running_loop().time() + 40.0
        late = asyncio.create_task(batcher.submit(2, admission, in_s))
        await asyncio.sleep(0)
        others = [asyncio.create_task(submit(batcher, item)) for item in (3, 4)]
        await asyncio.sleep(0)
        device.free.set()
        await asyncio.gather(busy, late, *others)
    assert device.batches == [[1], [3, 4], [2]]
    run.cancel()


async def test_a_caller_who_leaves_just_before_one_who_is_late_gives_its_place_back_once():
    started, free = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def work(items):
        started.set()
        await free.wait()
        loop.call_soon(leaving.cancel)  # the next batch is taken before its task hears of that
        return [2 * item for item in items]

    batcher, _ = opened(work, max_batch=8)
    batcher.forecast.batch_ended(1, 60.0, 60.0, crowded=True)
    run = asyncio.create_task(batcher.run())
    busy = asyncio.create_task(submit(batcher, 1))
    await started.wait()
    leaving = asyncio.create_task(submit(batcher, 2))
    with batcher.admit(1) as admission:
        admission.since -= 60.0
        late = asyncio.create_task(batcher.submit(3, admission, loop.time() + 20.0))
        await asyncio.sleep(0)
        free.set()
        assert (await late).result == 6
    assert await busy == 2
    run.cancel()


async def test_an_item_that_expired_while_the_loop_was_busy_never_reaches_the_device():
    """The consumer wakes before the timer of the item has fired."""
    device, loop = Device(), asyncio.get_running_loop()
    batcher, _ = opened(device)
    run = asyncio.create_task(batcher.run())
    await asyncio.sleep(0)
    late = asyncio.create_task(submit(batcher, 1, loop.time() + 0.005))
    loop.call_soon(time.sleep, 0.02)

    with pytest.raises(DeadlineExceeded):
        await late
    assert device.batches == []
    run.cancel()


async def test_a_failing_batch_fails_its_callers_only():
    async def divide(items):
        return [1 / item for item in items]

    batcher, _ = opened(divide, max_batch=1)
    run = asyncio.create_task(batcher.run())

    with pytest.raises(EngineFailed) as failure:
        await submit(batcher, 0)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)
    assert await submit(batcher, 2) == 0.5
    run.cancel()


async def test_a_device_that_answers_too_little_fails_the_batch():
    async def forgets(items):
        return items[1:]

    batcher, _ = opened(forgets)
    run = asyncio.create_task(batcher.run())
    with pytest.raises(EngineFailed):
        await submit(batcher, 1)
    run.cancel()


async def test_admission_counts_images_and_takes_a_request_whole_or_not_at_all():
    batcher, metrics = opened(Device(), queue_limit=5)  # nobody consumes
    with batcher.admit(3):
        with pytest.raises(Overloaded):
            batcher.admit(3)
        with batcher.admit(2):
            assert value(metrics.waiting) == 5
            with pytest.raises(Overloaded):
                batcher.admit(1)
        assert value(metrics.waiting) == 3
    assert value(metrics.waiting) == 0
    assert metrics.rejected["queue_full"]._value.get() == 2


async def test_places_are_free_as_soon_as_the_device_has_the_image():
    device = Device()
    batcher, _ = opened(device, queue_limit=1)
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    running = asyncio.create_task(submit(batcher, 1))
    await device.started.wait()
    with batcher.admit(1):
        pass
    device.free.set()
    await running
    run.cancel()


async def test_a_batcher_that_is_not_open_refuses():
    metrics = Metrics(CollectorRegistry()).add_model("m", "1", "classify", 1)
    batcher = Batcher(
        [Runner(Device(), 4)],
        max_batch=1,
        places=LocalPlaces(1),
        metrics=metrics,
        dispatch=Dispatch([Seat()]),
    )
    with pytest.raises(NotReady):
        batcher.admit(1)


async def test_draining_answers_what_was_admitted_and_refuses_the_rest():
    device = Device()
    batcher, _ = opened(device)
    run = asyncio.create_task(batcher.run())
    with batcher.admit(1) as decoding:
        batcher.begin_drain()
        with pytest.raises(Draining):
            batcher.admit(1)
        await asyncio.sleep(0)
        assert not run.done()
        answer = await batcher.submit(1, decoding, FAR)
    assert answer.result == 2
    await run


STEPS = st.lists(
    st.sampled_from(["submit", "cancel", "expire", "device", "fail"]), min_size=5, max_size=60
)


@given(STEPS, st.integers(1, 4), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_every_admitted_item_has_exactly_one_outcome_whatever_happens(steps, max_batch, limit):
    async def scenario():
        pending: asyncio.Queue[asyncio.Future] = asyncio.Queue()

        async def device(items):
            assert len(items) <= max_batch
            release = asyncio.get_running_loop().create_future()
            await pending.put(release)
            await release
            return [2 * item for item in items]

        batcher, metrics = opened(device, max_batch=max_batch, queue_limit=limit)
        run = asyncio.create_task(batcher.run())
        loop, tasks = asyncio.get_running_loop(), {}
        for number, step in enumerate(steps):
            if step == "submit":
                tasks[number] = asyncio.create_task(submit(batcher, number))
            elif step == "expire":
                tasks[number] = asyncio.create_task(submit(batcher, number, loop.time()))
            elif step == "cancel" and tasks:
                next(reversed(tasks.values())).cancel()
            elif not pending.empty():
                release = pending.get_nowait()
                if step == "fail":
                    release.set_exception(RuntimeError("device"))
                else:
                    release.set_result(None)
            for _ in range(3):
                await asyncio.sleep(0)
            assert value(metrics.waiting) <= limit
        batcher.begin_drain()
        while not run.done():
            await asyncio.sleep(0)
            if not pending.empty():
                pending.get_nowait().set_result(None)
        outcomes = await asyncio.gather(*tasks.values(), return_exceptions=True)
        for number, outcome in zip(tasks, outcomes, strict=True):
            expected = (DeadlineExceeded, EngineFailed, Overloaded, asyncio.CancelledError)
            assert outcome == 2 * number or isinstance(outcome, expected)
        assert value(metrics.waiting) == value(metrics.running) == 0

    asyncio.run(scenario())


async def test_models_that_share_a_device_take_turns_and_gather_meanwhile():
    seen: list[list[int]] = []
    dispatch, first, free = Dispatch([Seat()]), asyncio.Event(), asyncio.Event()

    async def device(items: Sequence[int]) -> list[int]:
        seen.append(list(items))
        first.set()
        await free.wait()
        return list(items)

    a, _ = opened(device, max_batch=2, dispatch=dispatch)
    b, b_metrics = opened(device, max_batch=2, dispatch=dispatch)
    runs = [asyncio.create_task(batcher.run()) for batcher in (a, b)]
    of_a = [asyncio.create_task(submit(a, n)) for n in range(5)]
    await first.wait()
    of_b = [asyncio.create_task(submit(b, n)) for n in range(100, 103)]
    await asyncio.sleep(0)
    free.set()
    assert await asyncio.gather(*of_a, *of_b) == [0, 1, 2, 3, 4, 100, 101, 102]
    assert seen == [[0, 1], [2, 3], [100, 101], [4], [102]]
    assert value(b_metrics.waiting) == 0
    for run in runs:
        run.cancel()


async def test_the_wait_estimate_counts_the_turns_of_other_models():
    dispatch = Dispatch([Seat()])
    device = Device()
    batcher, _ = opened(device, max_batch=1, dispatch=dispatch)
    run = asyncio.create_task(batcher.run())
    with await dispatch.place(lambda: True, whole):  # of another model
        waiting = asyncio.create_task(submit(batcher, 0))
        await asyncio.sleep(0.05)
    await waiting
    with batcher.admit(10):
        assert batcher.wait_estimate_s > 10 * 0.05
    run.cancel()


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_of_one_group_and_begins_with_the_oldest(items, max_batch, groups):
    items = list(enumerate(items))

    def group(item):
        return item[1] % groups

    async def scenario():
        seen: list[list[tuple[int, int]]] = []

        async def device(batch):
            seen.append(list(batch))
            return list(batch)

        batcher, _ = opened(device, max_batch=max_batch, group=group)
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(submit(batcher, item)) for item in items]
            await asyncio.sleep(0)
            run = tasks.create_task(batcher.run())
            batcher.begin_drain()
        assert [answer.result() for answer in answers] == items
        assert run.done()
        left = list(items)
        for batch in seen:
            assert batch == [i for i in left if group(i) == group(left[0])][:max_batch]
            left = [item for item in left if item not in batch]
        assert not left

    asyncio.run(scenario())


async def test_the_least_loaded_device_is_next():
    devices = [Device(), Device(), Device()]
    batcher, metrics = opened(*devices, max_batch=1)
    run = asyncio.create_task(batcher.run())
    for device in devices:
        device.free.clear()
    waiting = [asyncio.create_task(submit(batcher, n)) for n in range(5)]
    await asyncio.sleep(0.01)
    assert [device.batches for device in devices] == [[[0]], [[1]], [[2]]]
    devices[1].free.set()
    await waiting[4]
    assert [device.batches for device in devices] == [[[0]], [[1], [3], [4]], [[2]]]
    devices[0].free.set()
    await waiting[0]
    # Both are idle: the one that has been so for longer.
    assert await submit(batcher, 5) == 10
    assert devices[0].batches == [[0], [5]]
    devices[2].free.set()
    assert await asyncio.gather(*waiting) == [0, 2, 4, 6, 8]
    assert all(busy._value.get() > 0 for busy in metrics.busy_seconds)
    run.cancel()


async def test_a_device_takes_a_batch_ahead_if_it_is_full():
    device = Device()
    batcher, metrics = opened(device, max_batch=3, dispatch=Dispatch([Seat(depth=2)]))
    run = asyncio.create_task(batcher.run())
    device.free.clear()
    waiting = [asyncio.create_task(submit(batcher, 0))]
    await device.started.wait()
    for n in (1, 2):
        waiting.append(asyncio.create_task(submit(batcher, n)))
        await asyncio.sleep(0.01)
        assert device.batches == [[0]]  # it would only grow
    waiting.append(asyncio.create_task(submit(batcher, 3)))
    await asyncio.sleep(0.01)
    assert device.batches == [[0], [1, 2, 3]]
    waiting += [asyncio.create_task(submit(batcher, n)) for n in (4, 5, 6, 7)]
    await asyncio.sleep(0.01)
    assert device.batches == [[0], [1, 2, 3]]  # two at a time
    assert value(metrics.running) == 4
    device.free.set()
    assert await asyncio.gather(*waiting) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert device.batches == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert value(metrics.running) == 0
    run.cancel()


async def test_a_batch_ahead_counts_the_time_of_the_one_before_it_as_waiting():
    async def slow(items):
        await asyncio.sleep(0.05 * (1 + len(done)))
        done.append(items)
        return items

    done: list[Sequence[int]] = []
    batcher, metrics = opened(slow, max_batch=1, dispatch=Dispatch([Seat(depth=2)]))
    run = asyncio.create_task(batcher.run())

    async def timed(item):
        with batcher.admit(1) as admission:
            return await batcher.submit(item, admission, FAR)

    first, second = await asyncio.gather(timed(1), timed(2))
    assert second.queue_s >= first.compute_s - 0.005 >= 0.04
    busy = metrics.busy_seconds[0]._value.get()
    assert busy == pytest.approx(first.compute_s + second.compute_s)
    run.cancel()


async def test_a_device_that_cannot_be_trusted_takes_nothing_while_there_are_others():
    async def broken(_):
        seats[0].healthy = False
        raise RuntimeError("device")

    good, seats = Device(), [Seat(), Seat()]
    batcher, _ = opened(broken, good, max_batch=1, dispatch=Dispatch(seats))
    run = asyncio.create_task(batcher.run())
    with pytest.raises(EngineFailed):
        await submit(batcher, 0)
    assert await asyncio.gather(*(submit(batcher, n) for n in range(1, 6))) == [2, 4, 6, 8, 10]
    run.cancel()


async def test_what_a_runner_does_after_a_batch_delays_the_next_and_no_answer():
    class Settling(Runner):
        async def settle(self) -> None:
            settled.append(len(device.batches))
            await release.wait()

    settled: list[int] = []
    device, release = Device(), asyncio.Event()
    batcher, _ = opened(Settling(device), max_batch=1)
    run = asyncio.create_task(batcher.run())
    assert await submit(batcher, 1) == 2
    next_one = asyncio.create_task(submit(batcher, 2))
    await asyncio.sleep(0.01)
    assert settled == [1]
    assert not next_one.done()
    release.set()
    assert await next_one == 4
    run.cancel()


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=40),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_places_are_given_in_order_within_the_depth_and_never_lost(steps, depths):
    """Steps: 0 asks for a place, 1 leaves one, 2 cancels one that asks or was just given."""

    async def scenario():
        seats = [Seat(depth) for depth in depths]
        dispatch = Dispatch(seats)
        asking: list[asyncio.Task] = []
        held = []
        served = []

        async def ask(number):
            place = await dispatch.place(lambda: number % 2 == 0, whole)
            # By when it was given: who has it already goes on before who is still to be woken.
            served.append((place._entered, number))
            held.append(place)

        for number, (step, turns) in enumerate(steps):
            if step == 0:
                asking.append(asyncio.create_task(ask(number)))
            elif step == 1 and held:
                with held.pop(0):
                    pass
            elif step == 2 and asking:
                asking.pop().cancel()
            for _ in range(turns):
                await asyncio.sleep(0)
            for index, depth in enumerate(depths):
                assert sum(place.device == index for place in held) <= depth
        for task in asking:
            await asyncio.sleep(0)
            while not task.done():
                if held:
                    with held.pop(0):
                        pass
                await asyncio.sleep(0)
        numbers = [number for _, number in sorted(served)]
        assert numbers == sorted(numbers)
        for place in held:
            with place:
                pass
        # Nothing leaked: every device takes as many as it should.
        again = [await dispatch.place(lambda: True, whole) for _ in range(sum(depths))]
        assert [sum(p.device == i for p in again) for i in range(len(depths))] == depths

    asyncio.run(scenario())


async def test_the_device_with_fewer_batches_is_next_and_of_equals_the_one_idle_for_longer():
    dispatch = Dispatch([Seat(depth=2), Seat(depth=2), Seat(depth=2)])

    async def place():
        return await dispatch.place(lambda: True, whole)

    first, second, third = [await place() for _ in range(3)]
    assert [one.device for one in (first, second, third)] == [0, 1, 2]
    with third:
        pass
    again = await place()
    assert again.device == 2  # the others have a batch each
    for one in (again, second, first):
        with one:
            pass
    assert [(await place()).device for _ in range(3)] == [0, 1, 2]
    assert [(await place()).device for _ in range(3)] == [0, 1, 2]


async def test_of_idle_devices_the_one_used_last_is_last():
    dispatch = Dispatch([Seat(), Seat()])
    used = []
    for _ in range(4):
        with await dispatch.place(lambda: True, whole) as place:
            used.append(place.device)
    assert used == [0, 1, 0, 1]


async def test_a_place_that_is_given_to_one_who_just_left_is_free_again():
    dispatch = Dispatch([Seat()])
    held = await dispatch.place(lambda: True, whole)
    leaves = asyncio.create_task(dispatch.place(lambda: True, whole))
    await asyncio.sleep(0)
    with held:
        pass
    leaves.cancel()  # given, and not yet taken
    await asyncio.gather(leaves, return_exceptions=True)
    async with asyncio.timeout(1):
        assert (await dispatch.place(lambda: True, whole)).device == 0


async def test_the_wait_estimate_does_not_count_idle_time():
    batcher, _ = opened(Device(), max_batch=1)
    run = asyncio.create_task(batcher.run())
    await submit(batcher, 0)
    await asyncio.sleep(0.2)
    await submit(batcher, 1)
    with batcher.admit(10):
        assert batcher.wait_estimate_s < 10 * 0.02
    run.cancel()


async def test_only_the_item_that_makes_its_batch_fail_fails():
    async def picky(items):
        if any(item % 5 == 0 for item in items):
            raise ValueError("a multiple of five")
        return [2 * item for item in items]

    batcher, metrics = opened(picky, max_batch=16)
    run = asyncio.create_task(batcher.run())
    answers = await asyncio.gather(
        *(submit(batcher, n) for n in range(1, 33)), return_exceptions=True
    )
    for n, answer in enumerate(answers, 1):
        assert isinstance(answer, EngineFailed) if n % 5 == 0 else answer == 2 * n
    assert value(metrics.running) == value(metrics.waiting) == 0
    run.cancel()


@pytest.mark.slow
@given(st.lists(st.integers(1, 3), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_a_batch_that_does_not_fit_is_answered_in_parts_that_do(sizes, memory, max_batch):
    """An item that takes more memory than there is fails alone, in a bounded number of runs."""

    async def scenario():
        runs: list[int] = []

        async def device(items):
            runs.append(len(items))
            assert len(runs) <= 2 * len(sizes) + 20
            if sum(items) > memory:
                raise OutOfMemory("too many")
            return list(items)

        batcher, _ = opened(device, max_batch=max_batch)
        run = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(
            *(submit(batcher, size) for size in sizes), return_exceptions=True
        )
        for size, answer in zip(sizes, answers, strict=True):
            assert isinstance(answer, OutOfMemory) if size > memory else answer == size
        run.cancel()

    asyncio.run(scenario())


def test_a_size_that_fits_is_kept_for_a_while_and_grows_again():
    fit = Fit(8)
    fit.failed("group", 8)
    assert (fit.limit("group"), fit.limit("other")) == (4, 8)
    fit.failed("group", 4)
    for limit in (2, 4, 8):
        assert fit.limit("group") == limit
        for _ in range(1000):
            fit.worked("group", limit - 1)  # says nothing of more
        for _ in range(64):
            fit.worked("group", limit)


async def test_a_lost_device_fails_its_batch_and_what_waits_and_what_comes():
    async def lost(_):
        seat.healthy = False
        raise EngineUnavailable("lost")

    seat = Seat()
    batcher, metrics = opened(lost, max_batch=1, dispatch=Dispatch([seat]))
    run = asyncio.create_task(batcher.run())
    answers = await asyncio.gather(*(submit(batcher, n) for n in range(5)), return_exceptions=True)
    assert all(isinstance(answer, EngineUnavailable) for answer in answers)
    with pytest.raises(EngineUnavailable):
        batcher.admit(1)
    assert metrics.rejected["engine_unavailable"]._value.get() == 1
    assert value(metrics.running) == value(metrics.waiting) == 0
    batcher.begin_drain()
    await run


async def test_a_model_that_fails_on_a_blank_item_too_is_out_of_use_until_that_works():
    class Broken(Runner):
        async def probe(self, cores: int) -> None:
            if broken:
                raise RuntimeError("device")

    async def fails(items):
        if broken:
            raise RuntimeError("device")
        return items

    broken, told = True, []
    batcher, metrics = opened(Broken(fails), max_batch=1)
    batcher.on_change(lambda: told.append(batcher.trusted))
    run = asyncio.create_task(batcher.run())
    for _ in range(SUSPECT_AFTER):
        with pytest.raises(EngineFailed):
            await submit(batcher, 1)
    await asyncio.sleep(0)
    assert told == [False]
    with pytest.raises(EngineUnavailable) as refused:
        batcher.admit(1)
    assert refused.value.retry_after_s
    assert metrics.failing._value.get() == 1
    broken = False
    async with asyncio.timeout(10):
        while not batcher.trusted:
            await asyncio.sleep(0.01)
    assert told == [False, True]
    assert await submit(batcher, 1) == 1
    run.cancel()


async def test_callers_whose_items_fail_do_not_put_the_model_out_of_use():
    async def fails(_):
        raise RuntimeError("item")

    batcher, _ = opened(fails, max_batch=1)
    run = asyncio.create_task(batcher.run())
    for _ in range(3 * SUSPECT_AFTER):
        with pytest.raises(EngineFailed):
            await submit(batcher, 1)
    assert batcher.trusted
    run.cancel()
