"""The cost against the published figures, and against a count of what the modules compute."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import DAT, VARIANTS, DatConfig, create_model
from model.config import StageConfig
from model.cost import cost
from model.local_attention import NeighborhoodAttention
from tests.conftest import SMALL_DAT

# Of the official code: parameters of its checkpoints and GFLOPs counted by fvcore, then the
# figures in the tables of the papers, in millions and GFLOPs.
PUBLISHED = {
    "dat_tiny_224": (28_319_138, 4.589, 29, 4.6),
    "dat_small_224": (49_700_402, 9.008, 50, 9.0),
    "dat_base_224": (87_881_632, 15.788, 88, 15.8),
    "dat_base_384": (88_178_272, 49.772, 88, 49.8),
    "dat_pp_tiny_224": (23_962_876, 4.288, 24, 4.3),
    "dat_pp_small_224": (53_127_366, 9.426, 53, 9.4),
    "dat_pp_base_224": (93_690_640, 16.559, 94, 16.6),
    "dat_pp_base_384": (93_690_640, 49.734, 94, 49.7),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if "tiny" in name else pytest.mark.slow) for name in PUBLISHED],
)
def test_the_cost_is_the_published_one(name):
    parameters, gflops, paper_millions, paper_gflops = PUBLISHED[name]
    ours = cost(without_storage(VARIANTS[name]))
    assert ours.parameters == parameters
    assert round(ours.flops / 1e9, 3) == gflops
    assert round(ours.flops / 1e9, 1) == paper_gflops
    assert abs(ours.parameters / 1e6 - paper_millions) < 0.7  # DAT-T: 28.3, in the paper 29


def test_folding_drops_the_biases_of_keys_and_values_alone():
    network = create_model("dat_tiny_224")
    own = sum(parameter.numel() for parameter in network.parameters())
    dropped = sum(2 * layer.attention.q.in_features for layer in network.deformable_layers)
    assert cost(network).parameters == own + dropped


def without_storage(config: DatConfig) -> DAT:
    return DAT(config).eval().to("meta")


def counted(config):
    """FLOPs of a forward pass on the device without storage, as the operations are called.

    `FlopCounterMode` counts convolutions and matrix products, two for a multiply-add.
    """
    normed, sampled, weighted, not_real = [], [], [], []

    def keep_norm(_, __, output):
        normed.append(output.numel())

    def keep_attention(module, _, output):
        stream, locations, _ = output
        _, H, W, C = stream.tokens.shape
        if isinstance(module, NeighborhoodAttention):
            queries, keys = module.table_index.shape[1:]
            tiles = len(module.query_index)
            not_real.append(2 * C * (tiles * queries * keys - H * W * module.window**2))
        elif hasattr(module, "points"):
            points = locations[..., 0].numel()
            sampled.append(points * (C // module.heads))
            weighted.append(points * (C // module.heads))
        elif locations is not None:
            keys = prod(locations.shape[2:4])
            sampled.append(keys * C + module.heads * H * W * keys)

    network = without_storage(config)
    images = torch.empty(1, 3, *config.image_size, device="meta")
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(keep_norm)
    for stage in network.stages:
        for block in stage.blocks:
            block.attention.register_forward_hook(keep_attention)
    # It does not know the fused operations, which run where no gradient is wanted.
    with FlopCounterMode(display=False) as operations:
        network(images)
    products = operations.get_total_flops() // 2 - sum(not_real) + sum(weighted)
    return products + 5 * sum(normed) + 4 * sum(sampled)


@pytest.mark.parametrize(
    "name",
    [
        "dat_tiny_224",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("dat_pp_tiny_224", "dat_tiny_224_ddetr")
        ),
    ],
)
def test_a_variant_computes_what_is_counted(name):
    config = VARIANTS[name]
    assert cost(without_storage(config)).flops == counted(config)


@pytest.mark.slow
@given(
    st.integers(1, 4), st.sampled_from(["LSDQ", "Q", "DL"]), st.integers(1, 3), st.integers(1, 5)
)
@settings(max_examples=10, deadline=None)
def test_a_dat_of_any_shape_computes_what_is_counted(window, blocks, stride, points):
    side = 8 * window
    stages = tuple(StageConfig(blocks, dim, 2, 2, stride, 3, points) for dim in (8, 12))
    config = DatConfig("any", "dat", stages, (side, side), side, 5, window)
    assert cost(without_storage(config)).flops == counted(config)


@pytest.mark.slow
@given(st.integers(33, 90), st.integers(33, 140))
@settings(max_examples=8, deadline=None)
def test_a_dat_pp_of_any_size_computes_what_is_counted(height, width):
    """Maps that are rectangular, under a window and no multiple of the stride."""
    stages = (StageConfig("ND", 8, 2, 1, 8, 9), StageConfig("NQ", 16, 2, 2, 4, 7, 3))
    stages += (StageConfig("ND", 24, 2, 2, 2, 5),)
    config = DatConfig("any", "dat_pp", stages, (128, 128), 128, 12)
    resized = config.resized((height, width))
    ours = cost(without_storage(config), (height, width)).flops
    assert ours == cost(without_storage(resized)).flops == counted(resized)


def test_the_cost_of_two_blocks_by_hand():
    """One stage on an 8x8 map of 6 channels; 2 heads, 1 group, 16 keys of stride 2."""
    stage = StageConfig("LD", 6, 2, 1, 2, 3)
    config = DatConfig("tiny", "dat", (stage,), (32, 32), 32, 10, window=4)
    N, C, keys = 64, 6, 16
    stem = N * C * 48 + 5 * N * C
    norms = 4 * 5 * N * C + 5 * N * C
    mlps = 2 * (2 * N * C * 24)
    window = 4 * N * C * C + 2 * N * 16 * C
    projections = 2 * N * C * C + 2 * keys * C * C
    offsets = keys * C * 9 + 5 * keys * C + keys * C * 2
    sampling = 4 * keys * C + 4 * 2 * N * keys
    deformable = projections + offsets + sampling + 2 * N * keys * C
    expected = stem + norms + mlps + window + deformable + 10 * C
    assert cost(DAT(config)).flops == expected == 116_540


def test_a_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(ValueError, match="33"):
        cost(create_model("dat_nano"), (32, 128))
    with pytest.raises(ValueError, match="square"):
        cost(DAT(SMALL_DAT), (128, 256))
