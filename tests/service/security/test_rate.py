"""The law of the bucket, whatever is asked of it and when."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.security.rate import TokenBucket

RATES = st.floats(0.01, 1e4)
BURSTS = st.floats(0.1, 1e4)
STEPS = st.lists(
    st.tuples(st.floats(0, 100), st.integers(1, 200), st.booleans()), min_size=1, max_size=60
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@settings(deadline=None)
@given(RATES, BURSTS, STEPS)
def test_in_any_time_no_more_is_taken_than_the_burst_and_the_rate(rate, burst, steps):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    taken = []
    for pause, tokens, failed in steps:
        clock.now += pause
        wait_s = bucket.wait_s(tokens)
        assert bucket.take(tokens) == wait_s >= 0
        if not wait_s:
            if failed:
                bucket.give_back(tokens)
            else:
                taken.append((clock.now, tokens))
    largest = max(0.0, *(tokens - burst for _, tokens in taken), 0.0)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            asked = sum(tokens for _, tokens in taken[first : last + 1])
            seconds = taken[last][0] - taken[first][0]
            assert asked <= burst + rate * seconds + largest + 1e-6 * (1 + rate * 1e3)


@settings(deadline=None)
@given(RATES, BURSTS, STEPS)
def test_after_the_time_that_is_told_it_can_be_taken_and_not_long_before(rate, burst, steps):
    clock = Clock()
    bucket = TokenBucket(rate, burst, clock)
    for pause, tokens, _ in steps:
        clock.now += pause
        wait_s = bucket.take(tokens)
        if wait_s:
            began = clock.now
            clock.now = began + 0.9 * wait_s
            if wait_s * rate > 1e-3:
                assert bucket.wait_s(tokens) > 0
            clock.now = began + wait_s * (1 + 1e-9) + 1e-6
            assert bucket.take(tokens) == 0


def test_the_parts_of_processes_add_up():
    clock, parts = Clock(), 4
    buckets = [TokenBucket(8 / parts, 2 / parts, clock) for _ in range(parts)]
    taken = 0
    for _ in range(1000):
        clock.now += 0.05
        taken += sum(bucket.take(1) == 0 for bucket in buckets)
    assert taken == pytest.approx(8 * 50, abs=parts)


def test_a_change_gives_nothing_away():
    clock = Clock()
    bucket = TokenBucket(1, 10, clock)
    assert bucket.take(10) == 0
    bucket.change(100, 1000)
    assert bucket.wait_s() == pytest.approx(0.01)
    clock.now += 100
    bucket.change(1, 2)
    assert [bucket.take(1) for _ in range(3)] == [0, 0, pytest.approx(1)]
