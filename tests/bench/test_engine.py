"""The engine is compared round by round."""

from typing import Any

import numpy as np
import pytest

from bench.engine import PRODUCT_SIDE, compare
from bench.rival import Timed
from model import create_model
from model.cost import cost


class Taking:
    """A side that takes so many seconds a call in each round, twice that when it explains."""

    def __init__(self, *seconds: float) -> None:
        self.rounds, self.taken = list(seconds), 0.0

    def time(self, batch: int, seconds: float, *, explain: bool = False) -> Timed:
        assert (batch, seconds) == (4, 1.0)
        if not explain:
            self.taken = self.rounds.pop(0)
        return Timed(np.zeros((4, 2), np.float32), 2 * [(1 + explain) * self.taken])


def test_ratios_are_taken_in_their_round_and_the_first_round_does_not_count() -> None:
    rivals: Any = {
        "baseline": Taking(99, 4, 6, 8),
        "keeping": Taking(99, 3, 3, 3),
        "engine": Taking(99, 1, 2, 4),
        "product": Taking(99, 1, 1, 1),
    }
    row = compare("dat_tiny_224", rivals, 4, rounds=3, seconds=1.0)
    assert row["ratio"] == pytest.approx(3)
    assert row["ratio_range"] == pytest.approx([2, 4])
    assert row["ratio_to_keeping"] == pytest.approx(1.5)
    assert row["explained_over_plain_time"] == pytest.approx(2)

    multiply_adds = cost(create_model("dat_tiny_224")).flops
    rate = 4 * multiply_adds / 2  # of the engine in the middle round, a second
    assert row["share_of_product_rate"] == pytest.approx(rate / PRODUCT_SIDE**3)
    assert row["product_gflops"] == pytest.approx(2 * PRODUCT_SIDE**3 / 1e9)
