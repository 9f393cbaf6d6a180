"""Precisions are compared round by round, and only those that the CPU has instructions for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cpu import compare, instructions, tables
from bench.rival import Timed


class Taking:
    """A side that takes so many seconds a call in each round."""

    def __init__(self, *seconds: float) -> None:
        self.rounds = list(seconds)

    def time(self, batch: int, seconds: float) -> Timed:
        return Timed(np.full((batch, 2), len(self.rounds)), [self.rounds.pop(0)])


def test_ratios_are_taken_in_their_round_and_the_first_round_does_not_count() -> None:
    rivals: Any = {
        "float32": Taking(9, 4, 6, 8),
        "openvino float32": Taking(9, 4, 3, 8),
        "product float32": Taking(9, 2, 2, 2),
        "bfloat16": Taking(9, 2, 2, 2),
        "product bfloat16": Taking(9, 1, 1, 1),
    }
    rows = compare("dat_tiny_224", rivals, 2, rounds=3, seconds=1.0)
    assert [row["side"] for row in rows] == ["float32", "openvino float32", "bfloat16"]
    exact, openvino, half = rows
    assert (exact["ratio"], openvino["ratio"], half["ratio"]) == (1, 1, 3)
    assert half["ratio_range"] == [2, 4]
    # A third of the time of the product that is half as long.
    assert half["share_of_product_rate"] == pytest.approx(3 / 2 * exact["share_of_product_rate"])
    shown = tables({"instructions": None, "classifiers": rows, "detectors": []})
    assert "no instructions" in shown


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2", None),
        ("avx512f avx512_bf16", "avx512_bf16"),
        ("avx512_bf16 amx_tile amx_bf16", "amx_bf16"),
    ],
)
def test_the_fastest_instructions_are_named(tmp_path: Path, flags: str, expected: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}\n")
    assert instructions(file) == expected
