"""Scenes of several objects: what is seen of them, and how the detector sees them."""

import numpy as np
import pytest

from demo.detection.scenes import (
    CLASSES,
    LONGEST,
    SIDES,
    SMALL,
    Scene,
    enclosing,
    scene,
    upload,
)
from demo.detection.views import CONFIG, view

SEED = 11
SIZE = (180, 240)


@pytest.fixture(scope="module")
def scenes():
    return [scene(SEED, index, *SIZE) for index in range(60)]


def test_a_scene_depends_on_seed_and_index_alone():
    first, again = scene(SEED, 5, *SIZE), scene(SEED, 5, *SIZE)
    assert first.pixels.shape == (*SIZE, 3)
    for name in ("pixels", "labels", "instances", "visible"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for other in (scene(SEED + 1, 5, *SIZE), scene(SEED, 6, *SIZE)):
        assert not np.array_equal(first.pixels, other.pixels)


def test_scenes_have_one_to_six_objects_of_every_class(scenes):
    counts = [len(rendered.labels) for rendered in scenes]
    assert min(counts) == 1
    assert max(counts) == SMALL.most_objects
    assert set(np.concatenate([rendered.labels for rendered in scenes])) == set(range(len(CLASSES)))


def test_a_box_is_the_least_around_its_mask(scenes):
    for rendered in scenes:
        assert rendered.boxes.shape == (len(rendered.labels), 4)
        for mask, (x1, y1, x2, y2) in zip(rendered.masks, rendered.boxes.astype(int), strict=True):
            outside = mask.copy()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
            inside = mask[y1:y2, x1:x2]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_a_box_of_one_pixel():
    mask = np.zeros((4, 6), bool)
    mask[2, 5] = True
    assert enclosing(mask) == (5, 2, 6, 3)


def test_objects_hide_one_another_but_never_most_of_one(scenes):
    visible = np.concatenate([rendered.visible for rendered in scenes])
    assert visible.min() >= SMALL.least_visible
    inside = np.concatenate([_clear_of_the_edge(rendered) for rendered in scenes])
    assert (visible[inside] < 0.9).mean() > 0.12
    # Nothing is before the last object.
    last = [rendered.visible[-1] for rendered in scenes if _clear_of_the_edge(rendered)[-1]]
    assert min(last) > 0.93


def _clear_of_the_edge(rendered):
    height, width = SIZE
    return (rendered.boxes[:, :2] > 0).all(1) & (rendered.boxes[:, 2:] < (width, height)).all(1)


def test_masks_have_the_shape_of_their_class(scenes):
    """As the share of the box that they fill."""
    shares = {name: [] for name in CLASSES}
    for rendered in scenes:
        whole = (rendered.visible > 0.99) & _clear_of_the_edge(rendered)
        for label, mask, (x1, y1, x2, y2) in zip(
            rendered.labels[whole], rendered.masks[whole], rendered.boxes[whole], strict=True
        ):
            shares[CLASSES[label]].append(mask.sum() / ((x2 - x1) * (y2 - y1)))
    assert shares["circle"] == pytest.approx([np.pi / 4] * len(shares["circle"]), abs=0.04)
    assert 0.3 < min(shares["ring"]) <= max(shares["ring"]) < 0.65
    assert max(shares["star"]) < 0.6


def test_masks_lie_where_the_objects_are_painted(scenes):
    """The colours of an object differ from those right around it."""
    contrasts = []
    for rendered in scenes:
        for mask in rendered.masks:
            grown = mask
            for _ in range(3):
                grown = grown | _shifted(grown)
            ring = grown & (rendered.instances == 0)
            if ring.sum() > 30:
                inside, around = (rendered.pixels[area].mean(0) for area in (mask, ring))
                contrasts.append(np.linalg.norm(inside - around))
    assert np.quantile(contrasts, 0.05) > 30


def _shifted(mask):
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


@pytest.mark.slow
def test_uploads_vary_in_size():
    uploads = [upload(SEED, index)[0].instances.shape for index in range(40)]
    assert len(set(uploads)) > 30
    assert all(SIDES[0] <= min(shape) <= SIDES[1] for shape in uploads)
    assert all(max(shape) / min(shape) <= LONGEST for shape in uploads)
    assert {height > width for height, width in uploads} == {True, False}


def test_uploads_may_be_longer_than_in_training():
    shapes = [upload(SEED, index, longest=4)[0].instances.shape for index in range(8)]
    assert LONGEST < max(max(shape) / min(shape) for shape in shapes) <= 4


def test_a_view_is_the_scene_at_the_input():
    for index in range(10):
        rendered, file = upload(SEED, index)
        seen = view(rendered, file)
        size = CONFIG.resizing(rendered.instances.shape)
        assert seen.pixels.shape == (*size.resized, 3)
        assert seen.instances.shape == size.resized
        assert isinstance(seen, Scene)
        scaled = rendered.boxes * np.tile(size.scale_xy, 2)
        assert np.abs(seen.boxes - scaled).max() < 1.5
        # Its pixels are those of the picture: about the same colours under every mask.
        for small, large in zip(seen.masks, rendered.masks, strict=True):
            means = seen.pixels[small].mean(0), rendered.pixels[large].mean(0)
            assert np.abs(np.subtract(*means)).max() < 8
