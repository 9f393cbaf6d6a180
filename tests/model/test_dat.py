from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from model import DAT, VARIANTS, create_model, load_model
from model.checkpoint import CheckpointError
from model.official import official_shapes
from service.engine.classify import Classify
from tests.conftest import SMALL_DAT, official_state, recipe_state
from tests.model.detection.conftest import SMALL_BACKBONE
from tests.server import ROOT

# Million parameters in the tables of the papers.
PAPER_PARAMETERS = {
    "dat_tiny_224": 29, "dat_small_224": 50, "dat_base_224": 88, "dat_base_384": 88,
    "dat_pp_tiny_224": 24, "dat_pp_small_224": 53, "dat_pp_base_224": 94, "dat_pp_base_384": 94,
}  # fmt: skip


NANO_FILE = ROOT / "demo/dat_nano.safetensors"
SMALL = {"dat": SMALL_DAT, "dat_pp": VARIANTS["dat_nano"]}

# With layers of both kinds whose bias is laid out: windows and neighbourhoods.
LAID_OUT = [SMALL_DAT, SMALL_BACKBONE]


@pytest.fixture(params=SMALL)
def small(request):
    config = SMALL[request.param]
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config))
    return model


@pytest.mark.parametrize(("name", "millions"), PAPER_PARAMETERS.items())
def test_variants_have_the_parameters_of_the_papers(name, millions):
    shapes = official_shapes(VARIANTS[name]).values()
    count = sum(torch.Size(shape).numel() for shape in shapes)
    assert abs(count / 1e6 - millions) < 1


def test_an_unknown_variant_names_those_there_are():
    with pytest.raises(KeyError, match="dat_tiny_224"):
        create_model("resnet50")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dat_tiny_224", {"image_size": (448, 448), "table_size": 224}),
        ("dat_tiny_224", {"image_size": 100}),
        ("dat_tiny_224", {"image_size": (200, 200), "table_size": 200}),
        ("dat_pp_tiny_224", {"image_size": (32, 224)}),
        ("dat_pp_tiny_224", {"num_classes": 0}),
    ],
)
def test_a_size_that_a_variant_cannot_take_is_refused(name, changes):
    with pytest.raises(ValueError, match=name):
        create_model(name, **changes)


@pytest.mark.parametrize("size", [128, (128, 128), [128, 128], np.int64(128)], ids=str)
def test_the_side_of_a_square_is_a_size(size):
    model = create_model("dat_tiny_224", image_size=size)
    assert model.config == VARIANTS["dat_tiny_224"].resized((128, 128))
    assert (model.config.image_size, model.config.window) == ((128, 128), 4)
    assert load_model(NANO_FILE, image_size=size).config.image_size == (128, 128)
    assert replace(SMALL_DAT, image_size=size) == SMALL_DAT


@pytest.mark.parametrize("size", ["128", (128.0, 128.0), (3, 128, 128), (128,), None], ids=str)
def test_what_is_no_size_is_refused_with_what_is_one(size):
    message = r"image_size is the side of a square or \(height, width\), in whole pixels; got "
    with pytest.raises(ValueError, match=message):
        create_model("dat_nano", image_size=size)
    if size is not None:
        with pytest.raises(CheckpointError, match=rf"dat_nano\.safetensors: {message}"):
            load_model(NANO_FILE, image_size=size)


@pytest.mark.parametrize("grad", [True, False])
def test_no_images_have_no_logits(small, grad):
    one, none = torch.ones(1, 3, 128, 128), torch.ones(0, 3, 128, 128)
    cells = torch.zeros(0, 1, 2, dtype=torch.int64)
    with torch.set_grad_enabled(grad):
        expected = small.forward_explained(one, [1], cells.new_zeros(1, 1, 2))
        seen = small.forward_explained(none, [1], cells)
        assert small(none).shape == seen.logits.shape == (0, 12)
    pairs = [*zip(seen.sampling_locations, expected.sampling_locations, strict=True)]
    pairs += zip(seen.attention[0], expected.attention[0], strict=True)
    for ours, of_one in pairs:
        assert (ours.shape, ours.dtype) == ((0, *of_one.shape[1:]), of_one.dtype)
    if grad:
        seen.logits.sum().backward()
        assert not any(parameter.grad.any() for parameter in small.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 128, 128, dtype=torch.uint8), "float32 on cpu; got images in .*uint8"),
        (torch.zeros(1, 3, 128, 128, dtype=torch.float64), "float32 on cpu; got .*float64"),
        (torch.zeros(1, 3, 128, 128, device="meta"), "on cpu; got images in .* on meta"),
    ],
    ids=["bytes", "doubles", "meta"],
)
def test_images_of_another_type_or_device_are_refused(small, images, message):
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        small(images)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"bfloat16 on cpu; got .*t32"):
        small.cast(torch.bfloat16)(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("config", [*SMALL.values(), SMALL_BACKBONE], ids=lambda c: c.name)
def test_a_network_is_built_on_the_default_device(config):
    with torch.device("meta"):
        model = DAT(config).eval()
        assert model(torch.zeros(2, 3, *config.image_size)).shape == (2, config.num_classes)
    assert all(buffer.is_meta for buffer in model.buffers())


def test_autocast_takes_images_of_either_type(small):
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = small(images)
        with torch.autocast("cpu", torch.bfloat16):
            for given in (images, images.bfloat16()):
                assert (small(given).float() - expected).abs().max() < 0.25


def test_an_image_of_another_size_is_refused(small):
    with pytest.raises(ValueError, match="128"):
        small(torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize(
    "size", [(33, 33), (96, 128), pytest.param((225, 97), marks=pytest.mark.slow)]
)
def test_dat_pp_takes_any_size_from_33_pixels(size):
    model = create_model("dat_pp_tiny_224", image_size=size)
    model.load_state_dict(official_state("dat_pp_tiny_224"))
    with torch.inference_mode():
        outputs = model.forward_explained(torch.randn(1, 3, *size))
    assert outputs.logits.isfinite().all()
    assert all(locations.abs().max() <= 1 for locations in outputs.sampling_locations)


def test_a_row_is_the_same_alone_and_in_any_batch(small):
    model = small
    images = torch.randn(5, 3, *model.config.image_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        together = model.forward_explained(images)
        for row in range(5):
            alone = model.forward_explained(images[row : row + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
            for one, many in zip(
                alone.sampling_locations, together.sampling_locations, strict=True
            ):
                torch.testing.assert_close(one[0], many[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_spoils_no_other(small, value):
    images = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(8))
    spoilt = images.clone()
    spoilt[1] = value
    with torch.inference_mode():
        expected, outputs = small(images), small(spoilt)
    assert outputs[1].isnan().all()
    torch.testing.assert_close(outputs[::2], expected[::2], atol=1e-5, rtol=1e-5)


def test_training_mode_computes_the_same(small):
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = small(images)
        torch.testing.assert_close(small.train()(images), expected)


def test_loading_into_a_model_in_evaluation_mode_takes_effect(small):
    """The bias of windows is laid out once; it must be that of the new weights."""
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(5))
    other = DAT(small.config).eval()
    other.load_state_dict(recipe_state(small.config, seed=1))
    with torch.inference_mode():
        before = other(images)
        other.load_state_dict(recipe_state(small.config))
        torch.testing.assert_close(other(images), small(images))
        assert not torch.allclose(before, small(images), atol=0.1)


@pytest.mark.parametrize("config", LAID_OUT, ids=lambda config: config.name)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_are_written_to_in_evaluation_mode_take_effect(config, mode):
    """As a moving average writes them, whose network is never in training mode."""
    average, other = (DAT(config).eval() for _ in range(2))
    images = torch.randn(1, 3, *config.image_size, generator=torch.Generator().manual_seed(9))
    average.load_state_dict(recipe_state(config))
    other.load_state_dict(recipe_state(config, seed=1))
    with torch.no_grad():
        for parameter, new in zip(average.parameters(), other.parameters(), strict=True):
            parameter.lerp_(new, 1)
    with mode():
        assert torch.equal(average(images), other(images))


@pytest.mark.parametrize("config", LAID_OUT, ids=lambda config: config.name)
@pytest.mark.parametrize("training", [True, False])
def test_every_weight_has_a_gradient_in_both_modes(config, training):
    model = DAT(config).train(training)
    model.load_state_dict(recipe_state(config))
    images = torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(9))
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("config", LAID_OUT, ids=lambda config: config.name)
def test_a_network_is_compiled_whole(config):
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config))
    images = torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(9))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dat_tiny_224", "dat_pp_tiny_224"])
def test_half_precision_keeps_positions_in_float32(name, dtype):
    reference, half = create_model(name), create_model(name)
    for model in (reference, half):
        model.load_state_dict(official_state(name))
    half.cast(dtype)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode():
        expected, outputs = reference(images), half.forward_explained(images.to(dtype))
    assert all(locations.dtype == torch.float32 for locations in outputs.sampling_locations)
    assert outputs.logits.dtype == torch.float32
    error = (outputs.logits - expected).abs().max()
    assert error < (0.25 if dtype == torch.bfloat16 else 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_a_thousand_classes_apart(dtype):
    exact = DAT(replace(SMALL_DAT, num_classes=1000)).eval()
    exact.load_state_dict(recipe_state(exact.config))
    half = deepcopy(exact).cast(dtype)
    rounded = deepcopy(half)
    for part in (rounded.norm, rounded.head):
        part.to(dtype)
    images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = exact(images)
        ours, theirs = half(images.to(dtype)), rounded(images.to(dtype)).float()
    for logits, others in zip(ours, theirs, strict=True):
        assert len(logits.unique()) > 995
        assert len(others.unique()) < 970
    assert (ours - expected).square().mean() < (theirs - expected).square().mean()


@pytest.mark.parametrize(
    "name",
    ["dat_tiny_224", "dat_pp_tiny_224", pytest.param("dat_pp_base_384", marks=pytest.mark.slow)],
)
def test_the_forward_pass_can_be_captured(name):
    """Nothing depends on data, and no tensor is made from host values.

    On the device without storage, reading a value raises, and so does an operation that mixes
    in a tensor made on the host.
    """
    classify = Classify(create_model(name), torch.bfloat16).to("meta")
    pixels = torch.empty(2, *VARIANTS[name].image_size, 3, dtype=torch.uint8, device="meta")
    with torch.inference_mode():
        scores, _, _, locations, attention = classify(pixels)
    assert attention == ()
    assert scores.shape == (2, 1000)
    assert len(locations) == len(classify.model.deformable_layers)


def test_weights_without_a_head_are_taken_where_that_is_said(small):
    fresh = DAT(replace(small.config, num_classes=3)).eval()
    trunk = {key: value for key, value in small.state_dict().items() if not key.startswith("head.")}
    missing, unexpected = fresh.load_state_dict(trunk, strict=False)
    assert (set(missing), unexpected) == ({"head.weight", "head.bias"}, [])
    torch.testing.assert_close(fresh.norm.weight, small.norm.weight)
    with pytest.raises(CheckpointError, match=r"missing head\.weight"):
        fresh.load_state_dict(trunk)


def test_a_network_inside_of_another_loads_its_weights(small):
    outer = nn.Sequential(small, nn.Softmax(-1))
    other = nn.Sequential(DAT(small.config).eval(), nn.Softmax(-1))
    other.load_state_dict(outer.state_dict())
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        torch.testing.assert_close(other(images), outer(images))
