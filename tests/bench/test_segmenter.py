"""What the measurement of segmenters times, and what its table says."""

import json
from itertools import count
from pathlib import Path

import pytest
import torch

from bench import stages
from bench.harness import RESULTS
from bench.segmenter import STAGES, UPLOAD, make_picture, tables, time_stages
from model.segmentation import SEGMENTERS, segment
from model.segmentation.config import Kind
from tests.model.segmentation.conftest import KINDS, small_segmenter

FILES = sorted(RESULTS.glob("segmenter-*.json"))


def test_the_picture_becomes_the_input() -> None:
    picture = make_picture()
    assert picture.shape == (*UPLOAD, 3)
    assert picture.std() > 10
    published = [config for name, config in SEGMENTERS.items() if "dat_pp" in name]
    assert {config.resizing(UPLOAD).resized for config in published} == {(512, 683)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_is_timed_on_the_way_to_the_labels(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(stages, "perf_counter", lambda: float(next(ticks)))
    segmenter = small_segmenter(kind)
    picture = make_picture()[:200, :300]
    found, seconds = time_stages(segmenter, picture)
    assert seconds == dict.fromkeys(STAGES, 1.0)
    assert torch.equal(found.labels, segment(segmenter, picture).labels)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_table_has_every_model(path: Path) -> None:
    result = json.loads(path.read_text())
    rows = tables(result).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {m['name']}" for m in result["models"]]
    for model in result["models"]:
        assert sum(model["stages_ms"].values()) == pytest.approx(1e3 * model["seconds"], rel=0.2)
