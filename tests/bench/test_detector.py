"""What the measurement of detectors gives to which stage, and what it feeds them."""

from itertools import count

import pytest
import torch

from bench import stages
from bench.detector import SIZE, UPLOAD, make_inputs, tables
from bench.stages import POST_PROCESSING, STAGES, Stopwatch, time_stages
from model.detection import Detections, Detector
from model.detection.transforms import Resizing, to_model_pixels
from tests.model.detection.conftest import KINDS, small_detector

SMALL = (64, 96)


@pytest.fixture(params=KINDS, scope="module")
def detector(request: pytest.FixtureRequest) -> Detector:
    """A small detector of each kind."""
    return small_detector(request.param)


@torch.inference_mode()
def forward(detector: Detector) -> Detections:
    images = torch.randn(1, 3, *SMALL, generator=torch.Generator().manual_seed(0))
    resized = torch.tensor([SMALL])
    dense = detector.dense(images, resized)
    (found,) = detector.find_in(dense, resized, torch.ones(1, 2)).of_images()
    return found


def test_time_goes_to_the_innermost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(stages, "perf_counter", lambda: float(next(ticks)))
    stopwatch = Stopwatch()

    def outer() -> str:
        stopwatch.run("inner", lambda: None)
        stopwatch.run("inner", lambda: None)
        return "result"

    assert stopwatch.run("outer", outer) == "result"
    assert stopwatch.seconds == {"outer": 3, "inner": 2}


def test_every_stage_of_every_kind_is_timed_and_all_add_up(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(stages, "perf_counter", lambda: float(next(ticks)))

    found, seconds = time_stages(detector, SMALL, lambda: forward(detector))

    used = set(STAGES) if hasattr(detector.head, "rpn") else set(STAGES) - {"RoIAlign"}
    assert {stage for stage, spent in seconds.items() if spent > 0} == used
    assert sum(seconds.values()) == next(ticks) - 1
    expected = forward(detector)
    torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)
    assert sum(seconds.values()) == next(ticks) - 2, "a later pass is timed no more"


def test_inputs_are_what_a_server_makes_of_the_uploads() -> None:
    resizing = Resizing(UPLOAD)
    first, second, *_ = make_inputs()
    assert resizing.padded == SIZE == first.pixels.shape[:2]
    assert (first.resized, first.scale_xy) == (resizing.resized, resizing.scale_xy)
    height, width = UPLOAD
    expected = to_model_pixels(first.pixels[:height, :width], resizing)
    assert (first.pixels == expected).all()
    assert first.pixels.std() > 10
    assert (first.pixels != second.pixels).any()


def test_the_table_shows_the_share_of_the_post_processing() -> None:
    case = {
        "size": [640, 640],
        "forward_ms": 200.0,
        "stages_ms": {"backbone": 180.0, POST_PROCESSING: 20.0},
        "post_processing_share": 0.1,
        "post_processing_share_range": [0.08, 0.12],
        "work": {"detections": [100, 90]},
        "closed_loop": [],
    }
    table, _ = tables({"cases": [case]}).split("\n\n")
    row = "| 640x640 | 200.0 | 180.0 | 20.0 | **10.0%** (8.0%-12.0%) | 90 |"
    assert table.splitlines()[-1] == row
