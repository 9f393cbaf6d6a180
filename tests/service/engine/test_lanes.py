import threading
from time import sleep

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.lanes import Crowd, Lanes, plan


@given(st.integers(1, 100), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_every_row_is_in_one_share_and_no_round_has_too_many_threads(images, threads, team, dealt):
    rounds = plan(images, threads, team=team, dealt=dealt)
    rows = [row for shares in rounds for share in shares for row in range(100)[share.rows]]
    assert rows == list(range(images))
    for shares in rounds:
        lanes = min(len(shares), threads)
        assert sum(share.threads for share in shares[:lanes]) <= threads
        assert all(1 <= share.threads <= team for share in shares)


def shares(images, threads, *, team, dealt):
    return [
        [(share.rows.stop - share.rows.start, share.threads) for share in one]
        for one in plan(images, threads, team=team, dealt=dealt)
    ]


def test_a_lane_that_is_done_takes_single_images():
    assert shares(8, 2, team=99, dealt=True) == [[(2, 1), (2, 1), (1, 1), (1, 1), (1, 1), (1, 1)]]
    assert shares(4, 2, team=99, dealt=True) == [[(2, 1), (2, 1)]]
    # While others want the cores.
    assert shares(7, 2, team=1, dealt=True) == [[(1, 1)] * 7]


def test_what_is_left_over_has_all_threads_where_these_are_faster_together():
    assert shares(7, 2, team=99, dealt=True) == [[(1, 1)] * 6, [(1, 2)]]
    assert shares(1, 2, team=99, dealt=True) == [[(1, 2)]]


@pytest.mark.parametrize(
    ("images", "cores", "expected"),
    [
        (1, 4, [[(1, 4)]]),
        (1, 64, [[(1, 18)]]),
        (4, 16, [[(1, 4)] * 4]),
        (8, 64, [[(1, 8)] * 8]),
        (8, 8, [[(1, 1)] * 8]),
        (8, 5, [[(1, 1)] * 5, [(1, 1)] * 3]),
    ],
)
def test_an_image_has_as_many_threads_as_are_worth_while(images, cores, expected):
    assert shares(images, cores, team=18, dealt=True) == expected


@given(st.integers(1, 100), st.integers(1, 64))
def test_each_lane_has_one_share_of_a_small_model_and_all_are_as_large(images, threads):
    (one_round,) = shares(images, threads, team=1, dealt=False)
    assert len(one_round) == min(images, threads)
    sizes = [size for size, _ in one_round]
    assert max(sizes) - min(sizes) <= 1
    assert {of_share for _, of_share in one_round} == {1}


@settings(deadline=None)  # it opens threads
@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 8))
def test_all_sizes_of_shares_are_known_beforehand(images, threads, team):
    lanes = Lanes(threads)
    rows = range(images)
    taken = lanes.map(lambda share: len(rows[share]), images, team=team)
    assert lanes.share_sizes(images, team=team) >= set(taken)
    lanes.shutdown()


def test_shares_are_computed_at_the_same_time_in_inference_mode():
    lanes = Lanes(2)
    together = threading.Barrier(2, timeout=30)

    def work(rows: slice) -> tuple[int, int, bool]:
        if rows.stop <= 4:
            together.wait()
        return rows.start, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert lanes.map(work, 5, team=99) == [(0, 1, True), (2, 1, True), (4, 2, True)]
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

    def wait(share: slice) -> int:
        sleep(0.005)
        return len(rows[share])

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
