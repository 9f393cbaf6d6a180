"""Training of the segmenter: examples, steps, and a run that goes on."""

import numpy as np
import pytest
import torch
from PIL import Image

from demo.detection.evaluate import CHECKPOINT as DETECTOR
from demo.detection.scenes import CLASSES, scene
from demo.segmentation.maps import NAMES, labels, upload, write
from demo.segmentation.train import CONFIG, CROP, Example, Training, augment, batch
from demo.segmentation.train import _render_one as rendered
from demo.train import WARMUP_STEPS
from model.checkpoint import read
from service.evaluation.label_maps import LabelMaps


@pytest.fixture(scope="module")
def examples():
    return [rendered(index) for index in range(4)]


def test_every_pixel_has_the_class_of_what_is_seen_there():
    shown = scene(0, 3, 120, 160)
    of_pixels = labels(shown)
    for index, label in enumerate(shown.labels):
        assert (of_pixels[shown.instances == index + 1] == label + 1).all()
    assert (of_pixels[shown.instances == 0] == 0).all()
    assert len(NAMES) == CONFIG.num_classes == len(CLASSES) + 1


def test_scenes_are_written_as_an_evaluation_takes_them(tmp_path):
    write(tmp_path, 2, seed=1)
    maps = LabelMaps(tmp_path / "images", tmp_path / "maps")
    assert maps.files() == ["00000.jpg", "00001.jpg"]
    for index, file in enumerate(maps.files()):
        shown, data = upload(1, index)
        assert (tmp_path / "images" / file).read_bytes() == data
        assert (maps.right(file, len(NAMES)) == labels(shown)).all()
        with Image.open(tmp_path / "images" / file) as image:
            assert image.size[::-1] == shown.instances.shape


def test_squares_are_cut_from_pixels_and_labels_alike():
    of_pixels = np.random.default_rng(0).integers(0, 13, (CROP, CROP + 50), dtype=np.uint8)
    pixels = np.repeat(of_pixels[..., None] * 10, 3, -1)
    generator = np.random.default_rng(1)
    seen = set()
    for _ in range(20):
        cut = augment(Example(pixels, of_pixels), generator)
        assert cut.labels.shape == (CROP, CROP)
        assert (cut.pixels == cut.labels[..., None] * 10).all()
        seen.add(cut.labels.tobytes())
    assert len(seen) > 10


def started():
    run = Training(steps=100_000)
    run.step = WARMUP_STEPS
    run.segmenter.train()
    return run


def few(examples):
    pixels, of_pixels = batch(examples, 0)
    return pixels[:4], of_pixels[:4]


@pytest.mark.slow
def test_steps_lower_the_loss(examples):
    run, given = started(), few(examples)
    with torch.no_grad():
        before = run.loss(*given).item()
    for _ in range(10):
        run.advance(*given)
    with torch.no_grad():
        assert run.loss(*given).item() < 0.7 * before


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(examples, tmp_path):
    first, given = started(), few(examples)
    first.advance(*given)
    first.save(tmp_path / "state")
    second = Training(steps=100_000)
    second.load(tmp_path / "state")
    second.segmenter.train()
    assert second.step == WARMUP_STEPS + 1
    # The second of two steps depends on what the optimizer remembers.
    for _ in range(2):
        assert first.advance(*given) == second.advance(*given)


def test_backbone_and_pyramid_begin_as_those_of_the_detector():
    segmenter = Training(steps=1).segmenter
    detector = read(DETECTOR).state
    begun = {"backbone.": segmenter.backbone, "fpn.": segmenter.decode_head.pyramid}
    for prefix, part in begun.items():
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, detector[prefix + name]), name
