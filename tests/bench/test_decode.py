"""What the comparison of ways to decode measures, and what it compares with."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bench.decode import WAYS, Case, error, measure, tables
from model import VARIANTS
from model.transforms import Preprocessing

PREPROCESSING = Preprocessing.of(VARIANTS["dat_tiny_224"])
SMALL = Case(530, 520)


@pytest.mark.parametrize("case", [SMALL, Case(300, 200, "PNG"), Case(300, 200, "WEBP")])
def test_all_ways_show_the_same_picture(case: Case) -> None:
    upload, other = case.uploads()
    made = {name: way(upload, PREPROCESSING) for name, way in WAYS.items()}
    assert next(iter(made)) == "official"
    assert (made["served, `exact`"] == made["official"]).all()
    for pixels in made.values():
        assert error([pixels], [made["official"]])["mean"] < 2
    another = WAYS["official"](other, PREPROCESSING)
    assert error([another], [made["official"]])["mean"] > 20


def test_the_error_is_that_of_all_pictures() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    light = np.full((2, 2, 3), 200, np.uint8)
    assert error([black, light], [black, black]) == {"max": 200, "mean": 100}


def test_the_table_has_every_way_with_its_ratio_to_the_official_one() -> None:
    with ThreadPoolExecutor(1) as workers:
        rows = measure(SMALL, workers, rounds=1)
    assert [row["way"] for row in rows] == list(WAYS)
    official, exact, fast = rows
    assert official["one_thread"]["ratio"] == official["all_cores"]["ratio"] == 1
    assert (exact["error"]["max"], fast["error"]["max"] > 0) == (0, True)
    case = {"picture": SMALL.name, "variant": SMALL.variant, "rows": rows}
    table = tables({"cases": [case]}).splitlines()
    assert table[2].startswith("| 530x520 JPEG 90 4:2:0 | dat_tiny_224 | official | ")
    assert len(table) == 2 + len(rows)
