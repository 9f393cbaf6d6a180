"""When the processes of a place are said to die again and again."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.processes import child as children
from service.processes.child import Child


class Clock:
    """Time that passes when a test says so, seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "monotonic", clock := Clock())
        yield clock


def live(child: Child, clock: Clock, warm_up_s: float, well_s: float) -> None:
    """A process that is of use after a while, and is killed some time later."""
    clock.now += warm_up_s
    child.is_useful()
    clock.now += well_s
    child.died(-signal.SIGKILL)


@given(warm_up_s=st.floats(0, 300), well_s=st.floats(0, 9))
def test_deaths_are_a_loop_however_long_a_start_takes(
    clock: Clock, warm_up_s: float, well_s: float
):
    child = Child("worker-0")
    for _ in range(4):
        live(child, clock, warm_up_s, well_s)
        assert not child.looping
    for _ in range(20):
        live(child, clock, warm_up_s, well_s)
        clock.now += child.pause_s
        assert child.looping


def test_one_that_is_well_for_a_while_ends_the_loop(clock: Clock):
    child = Child("worker-0")
    for _ in range(7):
        live(child, clock, 1, 1)
    assert (child.looping, child.pause_s) == (True, 8)
    clock.now += 100  # it starts
    assert child.looping
    child.is_useful()
    clock.now += 9
    assert child.looping
    clock.now += 2
    assert not child.looping
    child.died(-signal.SIGKILL)
    assert child.pause_s == pytest.approx(0.1)


@given(times=st.lists(st.floats(11, 1000), min_size=1, max_size=20))
def test_what_dies_now_and_then_is_no_loop(clock: Clock, times: list[float]):
    child = Child("front-end-0")
    for well_s in times:
        live(child, clock, 1, well_s)
        assert not child.looping
        assert child.pause_s == pytest.approx(0.1)
