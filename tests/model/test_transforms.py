import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from model.config import VARIANTS
from model.detection import normalise as detection
from model.normalise import Normalise
from model.transforms import Preprocessing, to_model_pixels
from tests import recipe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "preprocess.npz")
META = json.loads(str(GOLDEN["meta"]))
PIPELINES = {
    (224, True): Preprocessing.of(VARIANTS["dat_tiny_224"]),
    (384, True): Preprocessing.of(VARIANTS["dat_base_384"]),
    (384, False): Preprocessing.of(VARIANTS["dat_pp_base_384"]),
}
any_pipeline = st.sampled_from(list(PIPELINES.values()))
sides = st.integers(1, 700)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: case["case"])
def test_pixels_are_those_of_the_official_pipeline(case):
    image = Image.fromarray(recipe.image(META["seed"], case["image_index"], *case["image_hw"]))
    preprocessing = PIPELINES[case["size"], case["crop"]]

    pixels = to_model_pixels(image, preprocessing)
    images = Normalise()(torch.from_numpy(pixels)[None])

    name, channels_first = case["case"], pixels.transpose(2, 0, 1)
    index = GOLDEN[f"{name}_index"]
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(channels_first.ravel()[index], GOLDEN[f"{name}_u8"])
    assert sha256(pixels) == case["resized_cropped_u8_sha256"]
    assert images.shape == (1, *case["shape"])
    assert sha256(images.numpy()) == case["tensor_sha256"]
    values = images.numpy().ravel()[index]
    np.testing.assert_allclose(values, GOLDEN[f"{name}_values"], rtol=0, atol=1e-6)


# Black and white: where two ways differ at all, they differ the most here.
NOISE = (recipe.image(0, 2, 700, 700) & 1) * np.uint8(255)


def resized_and_cropped(image, preprocessing):
    (height, width), (top, left) = preprocessing.image_size, preprocessing.crop_offset
    whole = image.resize(preprocessing.resize_to[::-1], Image.Resampling.BICUBIC)
    return np.asarray(whole.crop((left, top, left + width, top + height)))


@settings(max_examples=200, deadline=None)
@given(sides, sides, st.sampled_from([*PIPELINES.values(), Preprocessing((112, 224), (128, 256))]))
@example(300, 370, PIPELINES[224, True])  # the height first, were it resized to the crop alone
@example(240, 250, PIPELINES[224, True])
@example(256, 224, PIPELINES[224, True])
@example(219, 438, PIPELINES[384, True])
def test_pixels_are_those_of_the_whole_image_resized_then_cropped(width, height, preprocessing):
    image = Image.fromarray(np.ascontiguousarray(NOISE[:height, :width]))
    np.testing.assert_array_equal(
        to_model_pixels(image, preprocessing), resized_and_cropped(image, preprocessing)
    )


@pytest.mark.parametrize("size", [(65_535, 3), (3, 65_535), (1080, 1920)])
def test_pixels_of_long_sides_are_the_same_too(size):
    image = Image.fromarray(np.resize(NOISE, (size[1], size[0], 3)))
    np.testing.assert_array_equal(
        to_model_pixels(image, PIPELINES[224, True]),
        resized_and_cropped(image, PIPELINES[224, True]),
    )


def test_the_part_of_an_image_that_a_picture_covers_is_resized():
    picture = Image.fromarray(recipe.image(0, 3, 300, 500))
    padded = Image.new("RGB", (520, 330), "red")
    padded.paste(picture, (10, 20))
    pixels = to_model_pixels(padded, PIPELINES[224, True], (10, 20, 510, 320))
    expected = to_model_pixels(picture, PIPELINES[224, True])
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_crop_inside_the_resized_image(name):
    preprocessing = Preprocessing.of(VARIANTS[name])
    for whole, part, offset in zip(
        preprocessing.resize_to, preprocessing.image_size, preprocessing.crop_offset, strict=True
    ):
        assert 0 <= offset <= whole - part
        assert abs(whole - part - 2 * offset) <= 1
    pixels = to_model_pixels(Image.new("RGB", (50, 40)), preprocessing)
    assert pixels.shape == (*VARIANTS[name].image_size, 3)


def test_the_official_sizes():
    assert [(p.resize_to, p.crop_offset) for p in PIPELINES.values()] == [
        ((256, 256), (16, 16)),
        ((438, 438), (27, 27)),
        ((384, 384), (0, 0)),
    ]


@settings(deadline=None)
@given(sides, sides, st.tuples(*[st.integers(0, 255)] * 3), any_pipeline)
def test_an_image_of_one_colour_keeps_it(width, height, colour, preprocessing):
    pixels = to_model_pixels(Image.new("RGB", (width, height), colour), preprocessing)
    assert pixels.shape == (*preprocessing.image_size, 3)
    assert (pixels == colour).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_are_resized(size):
    pixels = to_model_pixels(Image.new("RGB", size, (9, 8, 7)), PIPELINES[224, True])
    assert (pixels == (9, 8, 7)).all()


def test_normalising_a_batch_gives_the_reference_values():
    pixels = np.stack([recipe.image(0, index, 40, 56) for index in (1, 2, 3)])
    images = Normalise()(torch.from_numpy(pixels))
    np.testing.assert_allclose(images, recipe.batch(0, (1, 2, 3), 40, 56), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_reduced_precision_rounds_only_the_result(dtype):
    pixels = torch.from_numpy(recipe.image(0, 1, 16, 16))[None]
    assert torch.equal(Normalise(dtype)(pixels), Normalise()(pixels).to(dtype))


@pytest.mark.parametrize("shape", [(8, 6, 3), (2, 3, 8, 6), (2, 8, 6, 4), (2, 8, 6, 1)], ids=str)
def test_pixels_of_another_shape_are_not_normalised(shape):
    with pytest.raises(ValueError, match=r"RGB images \(B, H, W, 3\), torch\.uint8; got"):
        Normalise()(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"RGB images \(B, H, W, 3\), torch\.uint8; got"):
        detection.Normalise()(torch.zeros(shape, dtype=torch.uint8), torch.ones(2, 2))


def test_what_is_no_byte_is_not_divided_by_255_again():
    with pytest.raises(ValueError, match=r"got \(1, 8, 6, 3\), torch\.float32"):
        Normalise()(torch.rand(1, 8, 6, 3))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_a_picture_in_other_colours_is_refused(mode):
    with pytest.raises(ValueError, match=rf"got the mode {mode}: image\.convert"):
        to_model_pixels(Image.new(mode, (40, 30)), PIPELINES[224, True])


def test_normalising_builds_no_tensor_on_the_host():
    # the meta device refuses to mix with tensors of the CPU
    pixels = torch.zeros(2, 8, 6, 3, dtype=torch.uint8, device="meta")
    assert Normalise().to("meta")(pixels).shape == (2, 3, 8, 6)


def test_normalising_adds_nothing_to_a_checkpoint():
    assert not Normalise().state_dict()


@settings(deadline=None)
@given(sides, sides, any_pipeline, st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=1))
def test_points_of_the_image_come_back(width, height, preprocessing, fractions):
    points = np.array(fractions) * (width, height)
    (top, left), (resized_height, resized_width) = (
        preprocessing.crop_offset,
        preprocessing.resize_to,
    )
    in_model = points * (resized_width / width, resized_height / height) - (left, top)
    back = preprocessing.pixel_map(width, height).to_image(in_model)
    np.testing.assert_allclose(back, points, rtol=1e-9, atol=1e-9)


def test_corners_of_the_crop():
    cropped = PIPELINES[224, True].pixel_map(640, 512)
    np.testing.assert_allclose(
        cropped.to_image([(0, 0), (224, 0), (224, 224), (-16, 240)]),
        [(40, 32), (600, 32), (600, 480), (0, 512)],
    )
    whole = PIPELINES[384, False].pixel_map(640, 512)
    np.testing.assert_allclose(whole.to_image([(0, 0), (384, 384)]), [(0, 0), (640, 512)])


def test_points_of_any_leading_shape():
    pixel_map = PIPELINES[224, True].pixel_map(640, 512)
    points = np.arange(24.0).reshape(2, 3, 2, 2)
    np.testing.assert_array_equal(
        pixel_map.to_image(points).reshape(-1, 2), pixel_map.to_image(points.reshape(-1, 2))
    )


@settings(deadline=None)
@given(
    st.integers(60, 700),
    st.integers(60, 700),
    any_pipeline,
    st.tuples(*[st.floats(0.2, 0.8)] * 2),
)
def test_a_bright_spot_is_where_the_map_says(width, height, preprocessing, centre):
    pixels = np.zeros((height, width, 3), np.uint8)
    # large enough to survive the reduction: 12 model pixels or more
    half_width, half_height = width // 20 + 1, height // 20 + 1
    x, y = int(centre[0] * width), int(centre[1] * height)
    pixels[y - half_height : y + half_height, x - half_width : x + half_width] = 255

    seen = to_model_pixels(Image.fromarray(pixels), preprocessing)[..., 0].astype(np.float64)
    rows, columns = np.indices(seen.shape) + 0.5
    spot = (columns * seen).sum() / seen.sum(), (rows * seen).sum() / seen.sum()

    pixel_map = preprocessing.pixel_map(width, height)
    # 0.05 pixels of the model: half a pixel is what a wrong convention would cost
    tolerance = 0.05 * max(pixel_map.scale)
    np.testing.assert_allclose(pixel_map.to_image(spot), (x, y), rtol=0, atol=tolerance)
