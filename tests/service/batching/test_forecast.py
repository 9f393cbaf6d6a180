"""What is learned from batches and callers, on a clock that the tests turn."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from service.batching.forecast import Forecast


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_nothing_is_foretold_before_anything_was_measured():
    forecast = Forecast()
    assert forecast.answer_s(100) == 0
    assert forecast.compute_s(8) == 0
    assert forecast.patience_s == inf


@given(st.floats(0.001, 10), st.integers(1, 64), st.integers(0, 500))
def test_an_answer_takes_the_time_of_all_that_is_ahead_of_it(seconds, size, items):
    forecast = Forecast()
    for _ in range(50):
        forecast.batch_ended(size, seconds, seconds)
    per_item = seconds / size
    assert items * per_item <= forecast.answer_s(items) <= 1.5 * items * per_item + 1e-9
    assert abs(forecast.compute_s(size) - seconds) < 1e-6 * seconds


def test_a_size_that_was_never_run_takes_no_less_than_a_smaller_one():
    forecast = Forecast()
    forecast.batch_ended(2, 0.1, 0.1)
    assert forecast.compute_s(1) == 0.1
    assert forecast.compute_s(8) == 0.4


def test_callers_who_leave_now_and_then_say_nothing_of_the_others():
    forecast = Forecast(Clock())
    for n in range(1000):
        if n % 20:
            forecast.caller_answered()
        else:
            forecast.caller_left(0.01)
    assert forecast.patience_s == inf


def test_a_crowd_that_leaves_early_is_remembered_relaxed_and_forgotten():
    clock = Clock()
    forecast = Forecast(clock)
    for _ in range(20):
        forecast.caller_left(0.05)
        forecast.caller_answered()
    assert forecast.patience_s == 0.05
    clock.now = 5
    assert 0.1 < forecast.patience_s < 0.3
    clock.now = 21
    assert forecast.patience_s == inf


def test_the_impatient_count_among_others():
    forecast = Forecast(Clock())
    for _ in range(20):
        forecast.caller_left(0.05)
        forecast.caller_left(5.0)
    assert forecast.patience_s == 0.05
