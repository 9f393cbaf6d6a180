"""Splits of the threads are compared round by round."""

from typing import Any

from bench.thread_split import FIGURES, compare, tables


class Answering:
    """A server with a fixed throughput in each round."""

    def __init__(self, *rates: float) -> None:
        self.rates = list(rates)

    def load(self, protocol: str, /, **options: object) -> dict[str, Any]:
        assert (protocol, options["concurrency"]) == ("http", 8)
        return dict.fromkeys(FIGURES, 1.0) | {"images_per_s": self.rates.pop(0)}


def test_a_ratio_is_taken_in_its_round_and_refers_to_all_threads() -> None:
    servers: Any = {(1, 1): Answering(10, 30, 12), (2, 2): Answering(20, 20, 20)}
    first, last = compare(servers, 3, concurrency=8, seconds=2.0)
    assert (first["ratio"], first["ratio_range"]) == (0.6, [0.5, 1.5])
    assert (last["ratio"], last["images_per_s"]) == (1, 20)
    row = "| 8 | 1 | 1 | 12.0 | **0.60** (0.50-1.50) | 1 / 1 / 1 | 100% | 0.50 |"
    assert tables({"rows": [first, last]}).splitlines()[2] == row
