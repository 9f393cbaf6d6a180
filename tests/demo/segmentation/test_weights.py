"""The bundled segmenter: its file, its pre-processing, and what it finds on new scenes."""

import pytest

from demo.segmentation.maps import NAMES, SEED, upload
from demo.segmentation.train import CHECKPOINT, TRAINING_SEED, VALIDATION_SEED, mean_iou
from model.segmentation import load_segmenter

LARGEST_FILE = 6_000_000  # bytes


@pytest.fixture(scope="module")
def loaded():
    return load_segmenter(CHECKPOINT)


def test_the_file_is_small_and_names_its_classes(loaded):
    assert CHECKPOINT.stat().st_size < LARGEST_FILE
    assert loaded.segmenter.config.name == "semantic_fpn_dat_nano"
    assert loaded.class_names == NAMES
    assert len(set(map(tuple, loaded.palette))) == len(NAMES)


def test_pictures_become_192_pixels_on_their_shorter_side(loaded):
    config = loaded.segmenter.config
    assert config.resizing((480, 640)).resized == (192, 256)
    assert config.resizing((600, 400)).resized == (288, 192)
    assert config.resizing((100, 400)).resized == (80, 320)  # the longer side has its limit


@pytest.mark.slow
def test_scenes_of_another_series_are_labelled(loaded):
    assert SEED not in (TRAINING_SEED, VALIDATION_SEED)
    scenes = [upload(SEED, index) for index in range(40)]
    assert mean_iou(loaded.segmenter, scenes) > 0.8
