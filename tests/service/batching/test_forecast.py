"""What is learned from batches and callers, on a clock that the tests turn."""

import asyncio
import random
from math import inf
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.dispatch import Dispatch
from service.batching.forecast import Forecast
from service.errors import Overloaded
from tests.service.batching.test_batcher import Seat, opened
from tests.virtual_time import in_virtual_time


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_nothing_is_foretold_before_anything_was_measured():
    forecast = Forecast()
    assert forecast.expect(100, 8, decode_s=1.0).seconds == 0
    assert forecast.compute_s(8) == 0
    assert forecast.patience_s == inf


def batches(forecast, size, compute_s, spacing_s=None, *, number=100, crowded=True):
    for _ in range(number):
        forecast.batch_ended(size, compute_s, spacing_s or compute_s, crowded=crowded)


@given(st.floats(0.001, 10), st.integers(1, 64), st.integers(1, 500))
def test_an_answer_takes_the_time_of_the_batches_ahead_of_it_and_its_own(seconds, size, items):
    forecast = Forecast(Clock())
    batches(forecast, size, seconds)
    whole = -(-items // size)
    assert forecast.expect(items, 0).seconds == pytest.approx(whole * seconds)
    assert forecast.expect(items, size).seconds == pytest.approx((whole + 1) * seconds)
    assert forecast.expect(0, 0).seconds == 0
    assert forecast.expect(1, 0, decode_s=7.0).seconds == pytest.approx(7.0 + seconds)
    assert abs(forecast.compute_s(size) - seconds) < 1e-6 * seconds


def test_what_a_device_has_done_already_of_its_batch_is_not_waited_for():
    clock = Clock()
    forecast = Forecast(clock)
    batches(forecast, 8, 1.0)
    forecast.batch_began()
    clock.now = 0.75
    assert forecast.expect(1, 8).seconds == pytest.approx(1.25)
    clock.now = 5.0  # it is late, and will end any moment
    assert forecast.expect(1, 8).seconds == pytest.approx(1.0)


def test_single_images_say_little_of_a_crowd():
    """Batches were full in the last crowd, and are of one image since."""
    forecast = Forecast(Clock())
    batches(forecast, 8, 0.04)
    batches(forecast, 1, 0.02)
    assert forecast.expect(64, 0).seconds == pytest.approx(0.32)
    assert forecast.expect(1, 0).seconds == pytest.approx(0.02)


def test_what_answers_take_beyond_their_batches_is_added_in_a_crowd_alone():
    forecast = Forecast(Clock())
    batches(forecast, 8, 0.04)
    for _ in range(600):
        forecast.answered(forecast.expect(64, 0), 0.48)
        forecast.answered(forecast.expect(1, 0), 10.0)
    assert forecast.expect(64, 0).seconds == pytest.approx(0.48, rel=0.01)
    assert forecast.expect(8, 0).seconds == pytest.approx(0.04)


def test_other_models_make_a_batch_wait_and_other_devices_do_not():
    shared, several = Forecast(Clock()), Forecast(Clock())
    batches(shared, 8, 0.04, spacing_s=0.1)
    assert shared.expect(16, 0).seconds == pytest.approx(0.2)
    batches(shared, 8, 0.04, crowded=False)  # the other model is idle again
    assert shared.expect(16, 0).seconds == pytest.approx(0.08, rel=0.01)
    batches(several, 8, 0.04, spacing_s=0.01)
    batches(several, 8, 0.04, crowded=False)  # while one device had nothing to do
    assert several.expect(32, 0).seconds == pytest.approx(0.01 * 3 + 0.04)


def test_a_size_that_was_never_run_takes_no_less_than_a_smaller_one():
    forecast = Forecast()
    batches(forecast, 2, 0.1, number=1)
    assert forecast.compute_s(1) == 0.1
    assert forecast.compute_s(8) == 0.4
    batches(forecast, 8, 0.22, number=1)
    assert forecast.compute_s(5) == pytest.approx(0.16)
    assert forecast.compute_s(16) == 0.44


def ends(forecast, clock, *ages, apart_s=0.01):
    """Callers end one after the other: those with a negative age leave, the others are answered."""
    for age in ages:
        clock.now += apart_s
        if age < 0:
            forecast.caller_left(-age)
        else:
            forecast.caller_answered(age)


@given(st.integers(2, 19), st.floats(0.001, 0.1))
def test_a_minority_that_leaves_at_once_does_not_speak_for_those_who_wait(others, early_s):
    clock = Clock()
    forecast = Forecast(clock)
    ends(forecast, clock, *([-early_s, *[0.2] * others] * 100))
    assert forecast.patience_s == inf


@given(st.lists(st.floats(0.001, 3), min_size=1, max_size=200), st.sampled_from([0, 1, 64, 300]))
def test_a_program_that_ends_with_requests_under_way_says_nothing_for_long(ages, answered):
    """However many it has, and however few it waited for."""
    clock = Clock()
    forecast = Forecast(clock)
    for _ in range(2):
        ends(forecast, clock, *[0.05] * answered)
        ends(forecast, clock, *(-age for age in ages), apart_s=0.1 / len(ages))
        clock.now += 0.51
        assert forecast.patience_s == inf
        clock.now += 2 * max(ages) + 1


def test_a_crowd_that_leaves_early_is_remembered_relaxed_and_forgotten():
    clock = Clock()
    forecast = Forecast(clock)
    ends(forecast, clock, *[-0.05, 0.02] * 20)
    assert forecast.patience_s == pytest.approx(0.05, rel=0.01)
    clock.now += 5
    assert 0.1 < forecast.patience_s < 0.3
    clock.now += 16
    assert forecast.patience_s == inf


def test_a_crowd_is_forgotten_when_somebody_waits_longer_and_nobody_leaves():
    clock = Clock()
    forecast = Forecast(clock)
    ends(forecast, clock, *[-0.05] * 60)
    ends(forecast, clock, 0.5)
    assert forecast.patience_s < 0.1
    clock.now += 1.1
    ends(forecast, clock, 0.05)
    assert forecast.patience_s < 0.1
    ends(forecast, clock, 0.5)
    assert forecast.patience_s == inf


def test_a_crowd_that_comes_again_when_it_was_forgotten_is_known_from_then_on():
    clock = Clock()
    forecast = Forecast(clock)
    ends(forecast, clock, *[-0.05] * 10, apart_s=0.005)
    assert forecast.patience_s < inf  # at once
    clock.now += 0.55
    assert forecast.patience_s == inf
    ends(forecast, clock, *[-0.05] * 10, apart_s=0.005)
    clock.now += 5
    assert forecast.patience_s < inf


def test_callers_who_were_answered_sooner_do_not_tell_how_long_they_would_have_waited():
    """A fast server answers most before they would leave, and the few others all leave."""
    clock = Clock()
    forecast = Forecast(clock)
    ends(forecast, clock, *[0.02, 0.03, 0.04, -0.05] * 20)
    assert forecast.patience_s == pytest.approx(0.05, rel=0.01)


@given(st.floats(0.1, 1), st.integers(1, 32), st.integers(20, 300))
def test_whoever_leaves_before_any_server_could_answer_says_nothing(seconds, size, leaving):
    clock = Clock()
    forecast = Forecast(clock)
    batches(forecast, size, seconds)
    ends(forecast, clock, *[-0.05] * leaving)
    assert forecast.patience_s == inf


def test_while_others_are_in_doubt_there_is_time_for_whole_batches():
    clock = Clock()
    forecast = Forecast(clock)
    batches(forecast, 1, 0.1)
    batches(forecast, 8, 0.4)
    ends(forecast, clock, *[-0.25] * 10, apart_s=0.001)
    assert forecast.patience_s >= 0.8
    ends(forecast, clock, *[-0.25] * 100)
    assert forecast.patience_s == pytest.approx(0.25, rel=0.02)


def test_requests_are_as_late_as_most_of_the_last_ones():
    clock = Clock()
    forecast = Forecast(clock)
    assert forecast.lag_s == 0
    forecast.request_read(0.1)
    assert forecast.lag_s == 0.1
    for seconds in (0.2, 9.0, 0.3, 9.0):
        forecast.request_read(seconds)
    assert forecast.lag_s == 0.3
    clock.now += 0.3
    assert forecast.lag_s == 0


async def test_a_caller_has_waited_since_it_asked_and_not_since_it_was_read():
    clock = Clock()
    batcher, _ = opened(lambda items: items, forecast=(forecast := Forecast(clock)))
    batches(forecast, 1, 0.1)
    forecast.request_read(0.5)
    with pytest.raises(Overloaded, match=r"would take 0\.62 s"):
        batcher.admit(1, 0.6)
    with batcher.admit(1, 0.7) as admission:
        assert asyncio.get_running_loop().time() - admission.since >= 0.5


def test_the_impatient_count_among_others():
    clock = Clock()
    forecast = Forecast(clock)
    ends(forecast, clock, *[-0.05, -5.0] * 20)
    assert forecast.patience_s == pytest.approx(0.05, rel=0.01)


# In bursts: a device that takes 4 ms for a batch and 2 ms for each of its images, threads that
# decode, and a host that takes a third of a millisecond for a request.


class Errors:
    """Of the answers that come: the difference of what was foretold, of what it took."""

    def __init__(self):
        self.seen: list[float] = []

    def observe(self, took_of_foretold: float) -> None:
        self.seen.append(abs(1 / took_of_foretold - 1))


async def bursts(sizes, *, devices=1, singles=0, decode_s=0.002, neighbours=0):
    chance, loop = random.Random(0), asyncio.get_running_loop()
    dispatch = Dispatch([Seat() for _ in range(devices)])
    errors, threads, host = Errors(), asyncio.Semaphore(2), asyncio.Lock()
    undecoded = 0

    async def device(items):
        await asyncio.sleep((0.004 + 0.002 * len(items)) * chance.uniform(0.9, 1.1))
        return items

    def model():
        batcher, _ = opened(
            *[device] * devices,
            max_batch=8,
            queue_limit=1000,
            dispatch=dispatch,
            forecast=Forecast(loop.time),
        )
        return batcher, asyncio.create_task(batcher.run())

    async def ask(batcher):
        nonlocal undecoded
        async with host:
            await asyncio.sleep(0.0003)
        undecoded += 1
        with batcher.admit(1, decode_s=max(1.0, undecoded / 2) * decode_s) as admission:
            async with batcher.ahead(admission, inf) as turn:
                async with threads:
                    await asyncio.sleep(decode_s)
                undecoded -= 1
                await turn.submit(1, admission, inf)
            admission.all_answered(errors)

    async def always(batcher):
        while True:
            with batcher.admit(1) as admission:
                await batcher.submit(1, admission, inf)

    (batcher, run), (other, other_run) = model(), model()
    running = [run, other_run, *(asyncio.create_task(always(other)) for _ in range(neighbours))]
    for number in range(6):
        for size in sizes:
            await asyncio.sleep(1)
            for _ in range(singles):
                await ask(batcher)
            await asyncio.gather(*(ask(batcher) for _ in range(size)))
        if not number:
            errors.seen.clear()  # nothing was known of crowds before
    for task in running:
        task.cancel()
    return errors.seen


@pytest.mark.parametrize(
    "burst",
    [
        {"sizes": [64]},
        {"sizes": [256]},
        {"sizes": [8, 64, 24, 128], "singles": 8},
        {"sizes": [64], "neighbours": 4},
        {"sizes": [16], "decode_s": 0.15},
        {"sizes": [128], "decode_s": 0.01},
        {"sizes": [64], "devices": 2},
        {"sizes": [256], "devices": 4, "decode_s": 0.0005},
    ],
    ids=str,
)
def test_in_bursts_most_answers_come_when_they_were_foretold(burst):
    errors = sorted(in_virtual_time(bursts(**burst)))
    assert median(errors) < 0.2
    assert errors[int(0.8 * len(errors))] < 0.35
