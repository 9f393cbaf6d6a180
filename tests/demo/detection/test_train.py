"""Training of the detector: batches, steps, and a run that goes on."""

import numpy as np
import pytest
import torch

from demo.detection.losses import Batch, losses
from demo.detection.scenes import CLASSES, Scene
from demo.detection.train import Batches, Training, render
from demo.train import CHECKPOINT, WARMUP_STEPS
from model.checkpoint import read

IMAGES = 2


@pytest.fixture(scope="module")
def views():
    return render(range(24))


@pytest.fixture(scope="module")
def batch(views):
    same = [seen for seen in views if seen.instances.shape == views[0].instances.shape]
    height, width = (-(-side // 32) * 32 for side in views[0].instances.shape)
    return Batch.of((same * IMAGES)[:IMAGES], (height, width))


def started():
    run = Training(steps=100_000)
    run.step = WARMUP_STEPS
    run.detector.train()
    return run


@pytest.fixture(scope="module")
def plain_views():
    """Three rectangles, each with one grey of its own, in pictures of every size."""
    rng = np.random.default_rng(0)
    views = []
    for width in (192, 210, 250, 270, 307):
        for shape in ((192, width), (width, 192)):
            instances = np.zeros(shape, np.uint8)
            for index in range(3):
                y, x = rng.integers(0, 150, 2)
                instances[y : y + 30, x : x + 20] = index + 1
            pixels = np.repeat(instances[..., None] * 50, 3, -1)
            views.append(Scene(pixels, np.arange(3), instances, np.ones(3)))
    return views


def test_batches_move_objects_and_pixels_alike(plain_views):
    data = Batches(plain_views, rank=0)
    shapes = set()
    for step in range(40):
        batch = data.at(step, 4)
        shapes.add(tuple(batch.pixels.shape[1:3]))
        for pixels, size, of_image in zip(batch.pixels, batch.sizes, batch.objects, strict=True):
            height, width = size.tolist()
            np.testing.assert_array_equal(pixels[:height, :width, 0], of_image.instances * 50)
            assert not pixels[height:].any()
            assert not pixels[:, width:].any()
    assert shapes >= {(192, width) for width in (224, 256, 288, 320)}
    assert shapes >= {(height, 192) for height in (224, 256, 288, 320)}


def test_processes_agree_on_the_size_of_a_step(plain_views):
    first, second = (Batches(plain_views, rank) for rank in (0, 1))
    differ = []
    for step in range(10):
        one, other = first.at(step, 2), second.at(step, 2)
        assert one.pixels.shape == other.pixels.shape
        differ.append(not torch.equal(one.pixels, other.pixels))
    assert any(differ)


@pytest.mark.slow
def test_steps_lower_every_loss(batch):
    run = started()
    generator = torch.Generator()

    def now():
        with torch.no_grad():
            return vars(losses(run.detector, batch, generator.manual_seed(0)))

    before = now()
    for _ in range(12):
        run.advance(batch)
    after = now()
    for name in ("objectness", "proposals", "classes", "masks", "guidance"):
        assert after[name] < 0.95 * before[name], name


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(batch, tmp_path):
    first = started()
    first.advance(batch)
    first.save(tmp_path / "state")
    second = Training(steps=100_000)
    second.load(tmp_path / "state")
    second.detector.train()
    assert second.step == WARMUP_STEPS + 1
    # The second of two steps depends on what the optimizer remembers.
    for _ in range(2):
        assert first.advance(batch) == second.advance(batch)


def test_the_backbone_begins_as_the_classifier():
    detector = Training(steps=1).detector
    assert detector.config.num_classes == len(CLASSES)
    classifier = read(CHECKPOINT).state
    for name, parameter in detector.backbone.stages.named_parameters():
        assert torch.equal(parameter, classifier[f"stages.{name}"]), name
