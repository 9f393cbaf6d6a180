"""The error of what was foretold follows from the buckets of the metric."""

import pytest

from bench.estimate import errors

EDGES = (0.5, 0.769, 1.0, 1.429, 2.0, float("inf"))


def counts(*by_bucket: int) -> dict[float, float]:
    """A reading of the metric, each bucket of which counts those below it as well."""
    return {edge: float(sum(by_bucket[: n + 1])) for n, edge in enumerate(EDGES)}


def test_the_goal_is_an_edge_and_what_was_before_does_not_count() -> None:
    before = counts(9, 0, 0, 0, 0, 7)
    found = errors(before, counts(9, 10, 30, 50, 10, 7))
    assert found["answers"] == 100
    assert found["within"] == pytest.approx(0.8)
    assert found["error_p50"] < 0.3 < found["error_p90"]
    assert 1.0 < found["ratio_p50"] < 1.429
    assert errors(before, counts(9, 0, 0, 0, 5, 7))["error_p50"] == pytest.approx(0.4, abs=0.1)
