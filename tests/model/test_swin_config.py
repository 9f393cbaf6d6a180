"""Where the windows of a Swin lie, and which configurations are taken."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cost import flops
from model.swin import parameters
from model.swin_config import SwinConfig, Windows

TINY = SwinConfig("swin", 96, (2, 2, 6, 2), (3, 6, 12, 24))


@st.composite
def windows(draw):
    side = draw(st.integers(2, 7))
    size = draw(st.integers(side, 30)), draw(st.integers(side, 30))
    shift = side // 2 if min(size) > side and draw(st.booleans()) else 0
    return Windows(size, side, shift)


def in_rolled_map(windows, row, column):
    """The window and the region of a cell, in the map that a shift has rolled."""
    places = []
    for index, cells in zip((row, column), windows.padded_size, strict=True):
        rolled = (index - windows.shift) % cells
        cuts = (cells - windows.side, cells - windows.shift) if windows.shift else ()
        places += [rolled // windows.side, sum(rolled >= cut for cut in cuts)]
    return places


@settings(max_examples=60, deadline=None)
@given(windows(), st.data())
def test_a_query_sees_the_cells_of_its_window_that_lie_together(windows, data):
    height, width = windows.padded_size
    row = data.draw(st.integers(0, windows.map_size[0] - 1))
    column = data.draw(st.integers(0, windows.map_size[1] - 1))
    top, left, bottom, right = windows.seen_from(row, column)
    own = in_rolled_map(windows, row, column)
    for y in range(height):
        for x in range(width):
            seen = top <= y < bottom and left <= x < right
            assert seen == (in_rolled_map(windows, y, x) == own), (y, x)


def test_sizes_are_those_of_the_published_swin():
    assert [TINY.map_size(stage) for stage in range(4)] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert TINY.windows(2, 4).shift == 0
    assert TINY.windows(2, 5).shift == 3
    assert TINY.windows(3, 1).shift == 0  # one window is the whole map
    assert parameters(TINY) == 28_288_354
    assert flops(TINY) / 1e9 == pytest.approx(4.5, abs=0.05)


def test_odd_sizes_are_padded_at_the_end():
    config = SwinConfig("swin", 8, (2, 2), (1, 2), window=4, image_size=(101, 60))
    assert [config.map_size(stage) for stage in range(2)] == [(26, 15), (13, 8)]
    assert config.windows(0, 1) == Windows((26, 15), 4, 2)
    assert config.windows(0, 1).padded_size == (28, 16)
    assert config.cell_geometry(1) == (8.0, 4.0)


def test_a_file_of_ours_keeps_all_of_it():
    config = SwinConfig("swin_nano", 16, (2, 2), (1, 2), 4, 2, 3.0, False, 1e-6, (48, 64), 12, True)
    assert SwinConfig.of_json(json.loads(json.dumps(asdict(config)))) == config


def of_transformers(**changes):
    return SwinConfig.of_transformers({"model_type": "swin", **changes}, 1000)


def test_a_config_of_transformers_has_its_defaults():
    assert of_transformers() == TINY
    own = of_transformers(
        embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12,
        image_size=384, mlp_ratio=3, qkv_bias=False, layer_norm_eps=1e-6,
    )  # fmt: skip
    assert own == SwinConfig(
        "swin", 128, (2, 2, 18, 2), (4, 8, 16, 32), 12, 4, 3.0, False, 1e-6, (384, 384)
    )
    assert of_transformers(image_size=[224, 448]).image_size == (224, 448)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "vit"}, "is of a 'vit', expected a 'swin'"),
        ({"model_type": "swinv2"}, "is of a 'swinv2', expected a 'swin'"),
        ({"use_absolute_embeddings": True}, "has use_absolute_embeddings True; .* False alone"),
        ({"hidden_act": "relu"}, "has hidden_act 'relu'; .* 'gelu' alone"),
        ({"num_channels": 1}, "has num_channels 1; .* 3 alone"),
        ({"embed_dim": "96"}, "has embed_dim '96', expected a whole number"),
        ({"embed_dim": True}, "has embed_dim True, expected a whole number"),
        ({"depths": 4}, "has depths 4, expected a list of whole numbers"),
        ({"depths": [2, 2]}, r"got depths \[2, 2\] and heads \[3, 6, 12, 24\]"),
        ({"depths": [2, 2, 0, 2]}, "a stage has 1 to 100 blocks"),
        ({"num_heads": [5, 6, 12, 24]}, "heads share the channels of their stage"),
        ({"embed_dim": 1 << 60}, "heads share the channels of their stage"),
        ({"image_size": 192}, "has a side of 6 cells, less than a window of 7; .* at least 193"),
        ({"image_size": 10**6}, "sizes are from 1 to 8192 pixels"),
        ({"image_size": [224]}, r"has image_size \[224\], expected a side, or height and width"),
        ({"window_size": 1}, "got windows of 1 cells"),
    ],
)
def test_what_is_not_served_is_refused_with_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        of_transformers(**changes)


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"name": "swin"},
        {"dim": 8, "depths": [2], "heads": "x"},
        {"depths": [2], "heads": [1], "image_size": [64, 64], "more": 1},
        {"name": "swin", "dim": "8", "depths": [2], "heads": [1], "image_size": [64, 64]},
    ],
)
def test_a_damaged_configuration_of_ours_is_refused(stored):
    with pytest.raises(ValueError, match=r"expected a list|not the configuration of a Swin"):
        SwinConfig.of_json(stored)
