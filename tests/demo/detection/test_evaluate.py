"""The bundled detector on scenes that it has never seen."""

import json

import pytest

from demo.detection.evaluate import CHECKPOINT, bundled_detector, evaluate
from demo.detection.scenes import CLASSES, upload
from model.checkpoint import read

SEED = 11

# The extension module of pycocotools still speaks to numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_the_checkpoint_names_the_classes():
    assert json.loads(read(CHECKPOINT).metadata["labels"]) == list(CLASSES)
    assert bundled_detector().config.name == "mask_rcnn_dat_nano"
    assert CHECKPOINT.stat().st_size < 8_000_000


@pytest.mark.slow
def test_the_bundled_detector_finds_objects_and_looks_at_them():
    uploads = [upload(SEED, index) for index in range(24)]
    figures = evaluate(bundled_detector(), uploads)
    assert figures["box_ap50"] >= 0.7
    assert figures["mask_ap50"] >= 0.7
    # The points follow the objects of this scene.
    for control in ("of_another_scene", "without_offset"):
        assert figures["points_at_objects"] > figures[f"points_at_objects_{control}"] + 0.25
