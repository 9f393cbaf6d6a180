"""What is launched on a GPU, counted on machines without one."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from model import VARIANTS, create_model
from model.fused import WIDEST, DepthwiseConv, linear
from service.engine.classify import Classify
from tests.service.engine.launches import launches

CLASSIFIERS = [
    name
    for name, config in VARIANTS.items()
    if not any("Q" in stage.blocks for stage in config.stages)
]
# A norm, queries, keys and values in one product, attention, projection; a norm and an MLP of two
# launches in DAT, of three in DAT++. A deformable block samples its keys and projects them.
OF_BLOCKS = {"dat": {"L": 7, "S": 7, "D": 9}, "dat_pp": {"N": 8, "D": 10}}
BETWEEN_STAGES = 3  # the last sum of a stage, a convolution, a norm
# Pixels, a stem of two convolutions and their norms; the last sum, pooling, the head, ranking.
ENDS = 9


@pytest.fixture(autouse=True)
def _no_values(monkeypatch):
    """Weights need none, and would take seconds to draw."""
    for kind in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(kind, "reset_parameters", lambda _: None)


@cache
def classified(name, batch):
    """Launches of the whole work of the device in bfloat16, and its outputs."""
    work = Classify(create_model(name), torch.bfloat16)
    return launches(work, batch, *VARIANTS[name].image_size, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "most"),
    [("dat_tiny_224", 110), pytest.param("dat_pp_tiny_224", 280, marks=pytest.mark.slow)],
)
def test_the_tiny_models_have_few_launches(name, most):
    made, _ = classified(name, 1)
    assert len(made) <= most
    assert [launch.name for launch in classified(name, 7)[0]] == [launch.name for launch in made]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if "tiny" in name or "nano" in name else pytest.mark.slow)
        for name in CLASSIFIERS
    ],
)
def test_launches_are_those_of_the_blocks(name):
    config = VARIANTS[name]
    of_block = OF_BLOCKS[config.family]
    of_blocks = sum(of_block[kind] for stage in config.stages for kind in stage.blocks)
    made, _ = classified(name, 1)
    assert len(made) <= of_blocks + BETWEEN_STAGES * (len(config.stages) - 1) + ENDS


@pytest.mark.parametrize("name", ["dat_tiny_224", "dat_pp_tiny_224", "dat_nano"])
def test_a_batch_moves_as_much_for_each_image(name):
    alone, seven = (
        [launch.moved - launch.parameters for launch in classified(name, batch)[0]]
        for batch in (1, 7)
    )
    assert [7 * moved for moved in alone] == seven


@pytest.mark.parametrize("name", ["dat_tiny_224", "dat_pp_tiny_224"])
@pytest.mark.parametrize("batch", [1, 7])
def test_what_comes_out_has_the_form_of_what_comes_out_of_torch(name, batch):
    config = VARIANTS[name]
    _, (scores, classes, logits, locations, _) = classified(name, batch)
    dtypes = torch.float32, torch.int32, torch.float32
    for output, dtype in zip((scores, classes, logits), dtypes, strict=True):
        assert (output.shape, output.dtype) == ((batch, config.num_classes), dtype)
    layers = create_model(name).deformable_layers
    for layer, points in zip(layers, locations, strict=True):
        groups = config.stages[layer.stage].offset_groups
        expected = (batch, groups, *layer.attention.reference_points.shape)
        assert (points.shape, points.dtype) == (expected, torch.float32)


@pytest.mark.parametrize(
    ("channels", "names"),
    [(WIDEST, ["_linear_gelu"]), (WIDEST + 32, ["aten::addmm", "aten::gelu"])],
)
def test_a_wide_linear_layer_is_left_to_the_library(channels, names):
    class Active(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(channels, 64)

        def forward(self, tokens):
            return linear(self.linear, tokens, "gelu")

    made, active = launches(Active().bfloat16(), 2, 7, channels, dtype=torch.bfloat16)
    assert [launch.name for launch in made] == names
    assert active.shape == (2, 7, 64)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bare = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.linear = nn.Linear(8, 4)

    def forward(self, images):
        maps = self.bare(self.conv(images))
        tokens = maps.permute(0, 2, 3, 1).flatten(1, 2).narrow(1, 1, 15)
        return self.linear(tokens.clone()).half().float().view(-1).add_(1)


def test_what_reaches_the_device_is_a_launch():
    made, _ = launches(Layers(), 2, 3, 4, 4, dtype=torch.float32)
    assert [(launch.name, launch.parameters) for launch in made] == [
        ("aten::convolution", 4 * (3 * 8 + 8)),
        ("bias of a convolution", 4 * 8),
        ("aten::convolution", 4 * 8 * 8),
        ("aten::clone", 0),
        ("aten::addmm", 4 * (8 * 4 + 4)),
        ("aten::_to_copy", 0),
        ("aten::_to_copy", 0),
        ("aten::add_", 0),
    ]
    assert made[3].moved == 2 * 4 * 2 * 15 * 8


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda tokens: tokens * tokens.amax().item(), DataDependentOutputException),
        (torch.ops.aten.nonzero.default, DynamicOutputShapeException),
    ],
)
def test_a_pass_that_waits_for_the_device_fails(wait, error):
    class Waiting(nn.Module):
        def forward(self, tokens):
            return wait(F.relu(tokens))

    with pytest.raises(error):
        launches(Waiting(), 4, dtype=torch.float32)


def test_kernels_of_depthwise_convolutions_lie_tap_by_tap_on_the_device():
    conv = DepthwiseConv(24)
    launches(conv, 1, 24, 5, 5, dtype=torch.float32)
    assert conv.weight.shape == (24, 1, 3, 3)
    assert [conv.weight.stride(axis) for axis in (0, 2, 3)] == [1, 3 * 24, 24]
