import threading
from time import sleep

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.lanes import Crowd, Lanes, plan


@given(st.integers(1, 100), st.integers(1, 64), st.integers(1, 64))
def test_every_row_is_in_one_lane_and_no_core_is_taken_twice(images, threads, team):
    lanes = plan(images, threads, team=team)
    assert [row for lane in lanes for row in range(100)[lane.rows]] == list(range(images))
    assert len(lanes) == min(images, threads)
    assert sum(lane.threads for lane in lanes) <= threads
    assert {1 <= lane.threads <= team for lane in lanes} == {True}
    sizes = [lane.rows.stop - lane.rows.start for lane in lanes]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("images", "cores", "expected"),
    [
        (1, 2, [(1, 2)]),
        (1, 4, [(1, 4)]),
        (1, 64, [(1, 18)]),
        (3, 2, [(2, 1), (1, 1)]),
        (4, 16, [(1, 4)] * 4),
        (8, 64, [(1, 8)] * 8),
        (8, 8, [(1, 1)] * 8),
        (8, 5, [(2, 1)] * 3 + [(1, 1)] * 2),
    ],
)
def test_an_image_has_as_many_threads_as_are_worth_while(images, cores, expected):
    lanes = plan(images, cores, team=18)
    assert [(lane.rows.stop - lane.rows.start, lane.threads) for lane in lanes] == expected


@settings(deadline=None)  # it opens threads
@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 8))
def test_all_sizes_of_lanes_are_known_beforehand(images, threads, team):
    lanes = Lanes(threads)
    rows = range(images)
    taken = lanes.map(lambda lane: len(rows[lane]), images, team=team)
    assert lanes.sizes(images, team=team) >= set(taken)
    lanes.shutdown()


def test_lanes_are_computed_at_the_same_time_in_inference_mode():
    lanes = Lanes(2)
    together = threading.Barrier(2, timeout=30)

    def work(rows: slice) -> tuple[int, int, bool]:
        together.wait()
        return rows.start, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert lanes.map(work, 5, team=99) == [(0, 1, True), (3, 1, True)]
    together.reset()
    assert lanes.one(lambda rows: (rows, torch.get_num_threads()), 5, threads=2) == (slice(0, 5), 2)
    assert not torch.is_inference_mode_enabled()
    lanes.shutdown()


def test_a_failure_in_a_lane_is_that_of_the_batch():
    lanes = Lanes(2)

    def work(rows: slice) -> None:
        if rows.start:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        lanes.map(work, 2, team=99)
    lanes.shutdown()


def test_a_small_model_takes_half_of_the_lanes_while_others_want_the_cores():
    lanes = Lanes(4)

    rows = range(8)

    def wait(lane: slice) -> int:
        sleep(0.005)
        return len(rows[lane])

    assert lanes.map(wait, 8, team=1) == [2, 2, 2, 2]
    assert [4, 4] in [lanes.map(wait, 8, team=1) for _ in range(20)]
    lanes.shutdown()


def test_a_team_that_waits_most_of_its_time_is_given_up_for_a_while():
    now = [0.0]
    crowd = Crowd(lambda: now[0])
    for _ in range(10):
        crowd.computed(0.97, 1.0)
    assert crowd.quiet
    crowd.computed(0.5, 1.0)
    assert crowd.quiet  # once is nothing
    crowd.computed(0.5, 1.0)
    assert not crowd.quiet
    now[0] = 0.6
    assert crowd.quiet  # tried again, and given up for longer
    crowd.computed(0.5, 1.0)
    crowd.computed(0.5, 1.0)
    now[0] = 1.5
    assert not crowd.quiet
    now[0] = 100.0
    for _ in range(20):
        crowd.computed(0.97, 1.0)
    assert crowd.quiet
