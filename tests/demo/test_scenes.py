"""The generated scenes, and the bundled model on some that it has never seen."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from demo.canvas import jpeg
from demo.evaluate import bundled_model, evaluate
from demo.samples import FOLDER
from demo.scenes import CLASSES, Scene, scene
from demo.shapes import outline
from demo.train import CHECKPOINT, CONFIG
from demo.views import upload, view
from model.checkpoint import read
from model.normalise import Normalise
from model.transforms import Preprocessing, to_model_pixels

SEED = 11
SIZES = [(128, 128), (150, 240), (300, 190)]


@pytest.mark.parametrize("size", SIZES)
def test_a_scene_depends_on_seed_and_index_alone(size):
    first, again = scene(SEED, 5, *size), scene(SEED, 5, *size)
    assert first.pixels.shape == (*size, 3)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.centre_xy == again.centre_xy
    for other in (scene(SEED + 1, 5, *size), scene(SEED, 5 + len(CLASSES), *size)):
        assert other.label == first.label
        assert not np.array_equal(first.pixels, other.pixels)


def test_classes_take_turns():
    labels = [scene(SEED, index, 32, 32).label for index in range(2 * len(CLASSES))]
    assert labels == 2 * list(range(len(CLASSES)))


def test_the_same_scene_at_two_sizes_is_the_same_picture():
    for index in range(20):
        small, large = scene(SEED, index, 120, 160), scene(SEED, index, 480, 640)
        assert np.multiply(small.centre_xy, 4) == pytest.approx(large.centre_xy)
        assert small.radius * 4 == pytest.approx(large.radius)
        reduced = np.asarray(Image.fromarray(large.pixels).reduce(4), dtype=np.int16)
        # Grain is drawn per pixel; a shape out of place would differ by its whole contrast.
        difference = np.abs(reduced - small.pixels)
        assert np.median(difference) < 12
        assert (difference.max(axis=2) > 80).mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_object_lies_inside_the_centre_crop(size):
    height, width = size
    preprocessing = Preprocessing.of(CONFIG)
    (top, left), crop = preprocessing.crop_offset, CONFIG.image_size[0]
    to_model = np.divide(preprocessing.resize_to[0], (width, height))
    for index in range(60):
        rendered = scene(SEED, index, height, width)
        assert 0.1 < rendered.radius / np.sqrt(height * width) < 0.4
        for side in (-1, 1):
            edge = (np.array(rendered.centre_xy) + side * rendered.radius) * to_model
            # Half a pixel of slack: the crop is a whole number of pixels.
            assert (edge >= np.array([left, top]) - 0.5).all()
            assert (edge <= np.array([left, top]) + crop + 0.5).all()


@pytest.mark.parametrize("name", CLASSES)
def test_an_outline_is_centred_and_of_radius_one(name):
    polygon = outline(name, np.random.default_rng(0))
    assert np.linalg.norm(polygon, axis=1).max() == pytest.approx(1)
    mask = Image.new("1", (400, 400))
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in polygon * 190 + 199.5], fill=1)
    rows, columns = np.nonzero(mask)
    assert np.array([columns.mean(), rows.mean()]) == pytest.approx(199.5, abs=1.5)


def test_the_object_stands_out_from_its_surroundings():
    solid = [CLASSES.index(name) for name in ("circle", "hexagon", "square")]
    for index in (turn * len(CLASSES) + label for turn in range(10) for label in solid):
        rendered = scene(SEED, index, 160, 160)
        y, x = np.ogrid[0.5:160, 0.5:160]
        distance = np.hypot(x - rendered.centre_xy[0], y - rendered.centre_xy[1])
        inside = rendered.pixels[distance < 0.4 * rendered.radius].mean(axis=0)
        around = rendered.pixels[
            (distance > 1.2 * rendered.radius) & (distance < 1.5 * rendered.radius)
        ].mean(axis=0)
        assert np.linalg.norm(inside - around) > 30


def test_a_jpeg_holds_the_scene():
    rendered = scene(SEED, 3, 120, 200)
    with Image.open(io.BytesIO(jpeg(rendered.pixels, 95))) as image:
        assert image.format == "JPEG"
        decoded = np.asarray(image, dtype=np.int16)
    assert np.abs(decoded - rendered.pixels).mean() < 8


def test_a_view_places_the_object_in_sampling_coordinates():
    def view_of(x, y):
        # A rectangle to the left of and above (x, y), to the picture's edges.
        outline_xy = np.array([[0.0, 0.0], [x, 0.0], [x, y], [0.0, y]])
        rendered = Scene(np.zeros((292, 584, 3), np.uint8), 0, (x, y), 48.0, outline_xy)
        return view(rendered, jpeg(rendered.pixels, 90), CONFIG)

    # 584 x 292 becomes 146 x 146, of which 9 pixels are cut on each side. The first and the last
    # cell of the last map look at pixels 0.5 and 96.5 of the crop (`DatConfig.cell_geometry`).
    corner = view_of(4 * (9 + 0.5), 2 * (9 + 96.5))
    assert corner.centre_yx == pytest.approx([1, -1], abs=1e-6)
    middle = view_of(292, 146)
    assert middle.centre_yx == pytest.approx([63.5 / 48 - 1] * 2, abs=1e-6)
    assert middle.radius == pytest.approx((48 / 4 + 48 / 2) / 2 / 48)
    covered = np.zeros((32, 32), np.uint8)
    covered[:16, :16] = 255
    assert np.abs(middle.coverage.astype(int) - covered).max() < 70


def test_uploads_vary_in_size():
    uploads = [upload(SEED, index, 320) for index in range(40)]
    shapes = {rendered.pixels.shape[:2] for rendered, _ in uploads}
    assert len(shapes) > 30
    assert all(min(shape) >= 128 and max(shape) <= 320 for shape in shapes)
    assert all(max(shape) / min(shape) < 1.62 for shape in shapes)


def test_the_checkpoint_names_the_classes():
    assert json.loads(read(CHECKPOINT).metadata["labels"]) == list(CLASSES)
    assert CHECKPOINT.stat().st_size < 4_000_000


@pytest.mark.slow
def test_the_bundled_model_knows_new_scenes_and_looks_at_the_object():
    views = [view(*upload(SEED, index, 320), CONFIG) for index in range(240)]
    figures = evaluate(bundled_model(), iter(views))
    assert figures["accuracy"] >= 0.98
    assert figures["points_nearer"] >= 0.9
    assert figures["scenes_with_most_points_nearer"] >= 0.98
    # The points follow this object, not the middle of the picture.
    for control in ("of_another_scene", "without_offset"):
        assert figures["points_at_object"] > figures[f"points_at_object_{control}"] + 0.25


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bundled_model_names_the_same_classes_in_half_precision(dtype):
    views = (view(*upload(SEED, index, 320), CONFIG) for index in range(200))
    assert evaluate(bundled_model(), views, dtype)["as_in_float32"] >= 0.99


@pytest.mark.parametrize("name", CLASSES)
def test_the_bundled_model_knows_the_samples(name):
    with Image.open(FOLDER / f"{name}.jpg") as image:
        pixels = to_model_pixels(image.convert("RGB"), Preprocessing.of(CONFIG))
    with torch.inference_mode():
        logits = bundled_model()(Normalise()(torch.from_numpy(pixels[None])))
    assert CLASSES[int(logits.argmax())] == name
