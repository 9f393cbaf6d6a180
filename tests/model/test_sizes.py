"""The model at many sizes of image, table, window and batch.

The oracle is held to the official golden cases, and the model in float64 to the oracle.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DAT, VARIANTS, DatConfig, create_model
from model.config import StageConfig
from tests import recipe
from tests.conftest import GOLDEN, SMALL_DAT, default_dtype, official_state, recipe_state
from tests.model.oracle import Oracle, bicubic
from tests.model.test_golden import LOGITS, assert_stored

pytestmark = pytest.mark.slow

FLOAT64 = 1e-12  # a hundred times the worst seen
# As published: strides, kernels, and both kinds of attention, here in every stage.
SMALL_DAT_PP = DatConfig(
    "small_dat_pp",
    "dat_pp",
    (
        StageConfig("ND", 8, 2, 1, 8, 9),
        StageConfig("ND", 8, 2, 2, 4, 7),
        StageConfig("ND", 16, 4, 2, 2, 5),
        StageConfig("ND", 16, 4, 4, 1, 3),
    ),
    num_classes=12,
)
SIZES = [(33, 33), (33, 64), (47, 90), (64, 33), (97, 61), (128, 128), (225, 97)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dat_tiny_224", "dat_pp_tiny_224"])
def test_the_oracle_is_the_official_model(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    image = recipe.batch(0, (0,), 224, 224)[0]
    logits, locations = Oracle(VARIANTS[name], official_state(name)).classify(image)
    assert_stored(logits, golden["logits"][0])
    layers = [
        f"pos_s{stage}_b{block}"
        for stage, spec in enumerate(VARIANTS[name].stages)
        for block, kind in enumerate(spec.blocks)
        if kind == "D"
    ]
    for key, ours in zip(layers, locations, strict=True):
        assert_stored(ours, golden[key])


@pytest.mark.parametrize("table_size", [64, 128])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dat_pp_is_the_oracle(size, table_size):
    check(replace(SMALL_DAT_PP, image_size=size, table_size=table_size))


@settings(max_examples=12, deadline=None)
@given(st.integers(33, 140), st.integers(33, 140), st.integers(33, 140))
def test_dat_pp_is_the_oracle_at_any_size(height, width, table_size):
    check(replace(SMALL_DAT_PP, image_size=(height, width), table_size=table_size))


@pytest.mark.parametrize(
    ("window", "side"), [(2, 64), (2, 192), (3, 96), (3, 192), (4, 128), (7, 224)]
)
def test_dat_is_the_oracle(window, side):
    check(replace(SMALL_DAT, image_size=(side, side), table_size=side, window=window))


def check(config: DatConfig) -> None:
    """Compare two images in one batch, in float64, with each by the oracle."""
    state = recipe_state(config)
    with default_dtype(torch.float64):
        model = DAT(config).eval()
    model.load_state_dict(dict(state))
    images = recipe.batch(0, (0, 1), *config.image_size).astype(np.float64)
    with torch.inference_mode():
        ours = model.forward_explained(torch.from_numpy(images))
    oracle = Oracle(config, state)
    for row, image in enumerate(images):
        logits, locations = oracle.classify(image)
        assert np.abs(ours.logits[row].numpy() - logits).max() < FLOAT64
        for layer, expected in zip(ours.sampling_locations, locations, strict=True):
            assert np.abs(layer[row].numpy() - expected).max() < FLOAT64


@pytest.mark.parametrize(("before", "after"), [((7, 7), (13, 13)), ((27, 13), (9, 31))])
def test_the_oracle_resizes_tables_as_torch_does(before, after):
    table = torch.randn(before, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = F.interpolate(table[None, None], after, mode="bicubic")[0, 0]
    np.testing.assert_allclose(bicubic(table.numpy(), *after), expected, atol=FLOAT64)


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (224, 32)], ids=str)
def test_dat_pp_needs_two_sampling_points_on_each_axis(size):
    with pytest.raises(ValueError, match=f"at least 33.*got {size[0]}x{size[1]}"):
        create_model("dat_pp_tiny_224", image_size=size)


@pytest.mark.parametrize("size", [(224, 448), (448, 224)], ids=str)
def test_dat_takes_squares_alone(size):
    with pytest.raises(ValueError, match=f"square.*got {size[0]}x{size[1]}"):
        create_model("dat_tiny_224", image_size=size)


@pytest.fixture(scope="module", params=["dat_tiny_224", "dat_pp_tiny_224"])
def tiny(request):
    model = create_model(request.param)
    model.load_state_dict(official_state(request.param))
    return model


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(recipe.batch(0, range(8), 224, 224))


@pytest.fixture(scope="module")
def alone(tiny, images):
    with torch.inference_mode():
        return torch.cat([tiny(image[None]) for image in images])


@pytest.mark.parametrize("size", range(2, 9))
def test_a_row_is_the_same_alone_and_in_a_batch(tiny, images, alone, size):
    with torch.inference_mode():
        together = tiny(images[:size])
    assert (together - alone[:size]).abs().max() < LOGITS


def test_padding_never_changes_a_row(tiny, images):
    padded = torch.full_like(images[:4], 1e3)
    padded[2] = images[2]
    with torch.inference_mode():
        assert torch.equal(tiny(padded)[2], tiny(images[:4])[2])
