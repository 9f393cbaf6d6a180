"""The figures of the load generator follow from the answers it recorded."""

import pytest

from bench.closed_loop import seconds_per_image
from bench.load import Answer, Reply, summarize


def test_throughput_runs_from_batch_to_batch_and_latency_counts_from_when_it_was_due() -> None:
    answers = [
        Answer(due=0.2, finished=0.7, reply=Reply("200", 1, 0.3)),  # answered before the window
        Answer(due=0.5, finished=1.7, reply=Reply("200", 2, 0.4)),  # due before it
        Answer(due=1.0, finished=1.7, reply=Reply("200", 2, 0.4)),
        Answer(due=2.0, finished=2.1, reply=Reply("429")),
        Answer(due=2.5, finished=3.5, reply=Reply("200", 1, 0.3)),  # answered after it
    ]

    figures = summarize(answers, start=1.0, end=3.0)

    assert figures["images_per_s"] == pytest.approx(2 / (1.7 - 0.7))
    assert figures["engine_busy"] == pytest.approx(0.4)
    assert figures["images_by_batch_size"] == {2: 2}
    assert figures["statuses"] == {"200": 2, "429": 1}
    assert figures["p50_ms"] == pytest.approx(850.0)


def test_the_engine_is_timed_at_the_batch_sizes_of_the_server() -> None:
    timed = {1: 0.06, 4: 0.03}

    assert seconds_per_image({"1": 5}, timed) == pytest.approx(0.06)
    assert seconds_per_image({"1": 2, "4": 4}, timed) == pytest.approx(0.04)
    assert seconds_per_image({"2": 7}, timed) == pytest.approx(0.05)
