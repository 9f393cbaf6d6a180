import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.lanes import Lanes, plan


@given(st.integers(1, 100), st.integers(1, 64))
def test_every_row_is_in_one_share_and_no_round_has_too_many_threads(images, threads):
    rounds = plan(images, threads)
    rows = [row for shares in rounds for share in shares for row in range(100)[share.rows]]
    assert rows == list(range(images))
    for shares in rounds:
        assert len({share.rows.stop - share.rows.start for share in shares}) == 1
        assert sum(share.threads for share in shares) <= threads
        assert all(share.threads for share in shares)


def test_full_lanes_first_then_what_is_left():
    (lanes, rest) = plan(7, 2)
    assert [(share.rows, share.threads) for share in lanes] == [
        (slice(0, 3), 1),
        (slice(3, 6), 1),
    ]
    assert [(share.rows, share.threads) for share in rest] == [(slice(6, 7), 2)]


@given(st.integers(1, 100), st.integers(1, 8))
def test_all_sizes_of_shares_are_known_beforehand(images, threads):
    lanes = Lanes(threads)
    rows = range(images)
    assert lanes.share_sizes(images) == set(lanes.map(lambda share: len(rows[share]), images))
    lanes.shutdown()


def test_shares_are_computed_at_the_same_time_in_inference_mode():
    lanes = Lanes(2)
    together = threading.Barrier(2, timeout=30)

    def work(rows: slice) -> tuple[int, int, bool]:
        if rows.stop <= 4:
            together.wait()
        return rows.start, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert lanes.map(work, 5) == [(0, 1, True), (2, 1, True), (4, 2, True)]
    lanes.shutdown()


def test_a_failure_in_a_lane_is_that_of_the_batch():
    lanes = Lanes(2)

    def work(rows: slice) -> None:
        if rows.start:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        lanes.map(work, 2)
    lanes.shutdown()
