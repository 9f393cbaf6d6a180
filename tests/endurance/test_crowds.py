"""More callers than can be answered, and callers who do not wait."""

from bench.overload import overload, storm
from bench.running_server import running_server

MODEL = {"DAT_MODEL__NAME": "dat_nano"}


def test_ten_times_the_load_is_turned_away_and_the_rest_is_answered(shape, figures, request):
    """The crowd has the same cores as the server here, so the figures are of both.

    `python -m bench.overload` measures them, with a core for the crowd as well.
    """
    with running_server(None, **MODEL, **shape) as server:
        row = overload(server, 10, request.config.getoption("--crowd-seconds"))
    figures(**row)
    assert set(row["statuses"]) == {"200", "429"}
    assert row["goodput"] > 0.35
    assert row["recovered"] > 0.6
    assert row["refused_ms"]["p50"] < row["answered_ms"]["p50"]
    assert row["probes_ms"]


def test_little_is_computed_for_callers_who_left(shape, figures):
    with running_server(None, **MODEL, **shape) as server:
        capacity = server.load("http", concurrency=32, seconds=3, warmup=1)["answered_per_s"]
        row = storm(server, 3 * capacity, 8, "/v1/classify?timeout=0.05")
        after = server.load("http", concurrency=32, seconds=3, warmup=2)["answered_per_s"]
    figures(capacity=capacity, after=after, **row)
    assert row["computed"] > 0
    assert row["wasted"] < 0.05
    assert after > 0.6 * capacity
