"""The attention of Deformable DETR against nested loops, and the variants that are made of it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DAT, VARIANTS, DatConfig, create_model
from model.config import StageConfig
from model.cost import cost
from model.deformable_detr import DeformableDetrAttention, weighted_samples
from model.official import official_shapes
from model.transforms import PixelMap
from service.engine.classify import Classify
from service.tasks.points import point_layers
from tests.conftest import official_state, recipe_state

SMALL = DatConfig(
    "small_ddetr",
    "dat",
    (
        StageConfig("L", 16, 1),
        StageConfig("S", 32, 2),
        StageConfig("LQ", 64, 4, points=5),
        StageConfig("LQ", 128, 8, points=3),
    ),
    (128, 128),
    128,
    num_classes=12,
    window=4,
)
# Keys of a query in the last two stages.
KEYS = {"dat_tiny_224_ddetr": (16, 16), "dat_tiny_224_ddetr_equal": (196, 49)}
SEEDS = st.integers(0, 2**31)


def small() -> DAT:
    model = DAT(SMALL).eval()
    model.load_state_dict(recipe_state(SMALL))
    return model


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 5), SEEDS)
@settings(max_examples=60, deadline=None)
def test_weighted_samples_are_those_of_grid_sample(H, W, heads, points, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, H, W, heads * 3, dtype=torch.float64, generator=generator)
    rows, columns, weights = torch.rand(3, 2, 4, heads, points, generator=generator).double()
    rows, columns = rows * (H + 4) - 2.5, columns * (W + 4) - 2.5
    rows[0, 0, 0, 0], columns[0, 0, 0, 0] = H - 1, 0  # on a cell of the border itself
    rows[1, 0, 0, 0], rows[1, 1, 0, 0], columns[1, 2, 0, 0] = 1e9, math.nan, -math.inf

    ours = weighted_samples(values, rows, columns, weights)

    rows, columns = (cells.nan_to_num(-9).clamp(-9, 99) for cells in (rows, columns))
    maps = values.view(2, H, W, heads, 3).permute(0, 3, 4, 1, 2).reshape(2 * heads, 3, H, W)
    grid = torch.stack(((columns + 0.5) * 2 / W - 1, (rows + 0.5) * 2 / H - 1), -1)
    grid = grid.transpose(1, 2).reshape(2 * heads, 4, points, 2)
    sampled = F.grid_sample(maps, grid, align_corners=False).view(2, heads, 3, 4, points)
    expected = torch.einsum("bhdqk,bqhk->bqhd", sampled, weights).reshape(2, 4, heads * 3)
    torch.testing.assert_close(ours, expected)


def attention_for(H: int, W: int, heads: int, points: int, seed: int) -> DeformableDetrAttention:
    """Of the third stage, in float64, with offsets of a few cells."""
    stage = StageConfig("Q", 3 * heads, heads, points=points)
    config = DatConfig("test", "dat_pp", (stage,) * 3, (16 * H, 16 * W))
    generator = torch.Generator().manual_seed(seed)
    attention = DeformableDetrAttention(config, 2)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return attention.double().eval()


def read(values, y, x):
    """The map `(H, W, d)` at `(y, x)`, in cells, between its four neighbours; zero outside."""
    H, W, d = values.shape
    out = torch.zeros(d, dtype=values.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < H and 0 <= column < W:
                out += (1 - abs(y - row)) * (1 - abs(x - column)) * values[row, column]
    return out


def oracle(attention, tokens):
    """Equation 2 for one image, a query, head and point at a time, and the points in cells."""
    H, W, C = tokens.shape
    heads, points = attention.heads, attention.points
    values = attention.value_proj(tokens).view(H, W, heads, C // heads)
    offsets = attention.offset_proj(tokens).view(H, W, heads, points, 2)
    weights = attention.weight_proj(tokens).view(H, W, heads, points).softmax(-1)
    out = torch.zeros(H, W, heads, C // heads, dtype=tokens.dtype)
    cells = torch.zeros(heads, H * W, points, 2, dtype=tokens.dtype)
    for row in range(H):
        for column in range(W):
            for head in range(heads):
                for point in range(points):
                    dx, dy = offsets[row, column, head, point].tolist()
                    y, x = row + dy, column + dx
                    sampled = read(values[:, :, head], y, x)
                    out[row, column, head] += weights[row, column, head, point] * sampled
                    cells[head, row * W + column, point] = torch.tensor([y, x])
    return attention.proj(out.view(H, W, C)), cells


@given(st.integers(3, 6), st.integers(3, 6), st.integers(1, 3), st.integers(1, 4), SEEDS)
@settings(max_examples=15, deadline=None)
def test_every_query_sums_the_values_at_its_own_points(H, W, heads, points, seed):
    attention = attention_for(H, W, heads, points, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, H, W, 3 * heads, generator=generator).double()
    last = torch.tensor([H - 1, W - 1])
    with torch.no_grad():
        ours = attention(tokens, torch.zeros_like(tokens))
        for image in range(2):
            expected, cells = oracle(attention, tokens[image])
            torch.testing.assert_close(ours.stream.sum()[image], expected)
            torch.testing.assert_close((ours.sampling_locations[image] + 1) / 2 * last, cells)


def test_geometry_has_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        attention = DeformableDetrAttention(SMALL, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert attention.reference_points.dtype == torch.float64
    tokens = torch.zeros(1, 8, 8, 64, dtype=torch.float64)
    locations = attention(tokens, tokens).sampling_locations
    assert locations.dtype == torch.float64


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_no_number_fails_alone(poison):
    model, images = small(), pictures(2, 1)
    images[0, :, 40:80, 40:80] = poison
    with torch.inference_mode():
        logits = model(images)
        torch.testing.assert_close(logits[1:], model(images[1:]), atol=1e-5, rtol=1e-5)
    assert not logits[0].isfinite().any()


def test_a_row_is_the_same_alone_and_in_any_batch():
    model, images = small(), pictures(5, 3)
    with torch.inference_mode():
        together = model.forward_explained(images)
        for row in range(5):
            alone = model.forward_explained(images[row : row + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-5, rtol=1e-5)
            for one, many in zip(
                alone.sampling_locations, together.sampling_locations, strict=True
            ):
                torch.testing.assert_close(one[0], many[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_positions_in_float32(dtype):
    reference, half = small(), small().cast(dtype)
    images = pictures(2, 6)
    with torch.inference_mode():
        expected, outputs = reference(images), half.forward_explained(images.to(dtype))
    assert outputs.logits.dtype == torch.float32
    assert all(locations.dtype == torch.float32 for locations in outputs.sampling_locations)
    error = (outputs.logits - expected).abs().max()
    assert error < (0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("name", KEYS)
def test_the_forward_pass_can_be_captured(name):
    classify = Classify(create_model(name), torch.bfloat16).to("meta")
    pixels = torch.empty(2, 224, 224, 3, dtype=torch.uint8, device="meta")
    with torch.inference_mode():
        scores, _, _, locations, _ = classify(pixels)
    assert scores.shape == (2, 1000)
    assert len(locations) == len(classify.model.deformable_layers) == 4


@pytest.mark.parametrize(("name", "keys"), KEYS.items())
def test_the_variants_are_dat_tiny_with_other_attention(name, keys):
    """Names of the layers are Deformable DETR's own, all others the official ones of DAT."""
    ours, dat = official_shapes(VARIANTS[name]), official_shapes(VARIANTS["dat_tiny_224"])
    replaced = [f"stages.2.attns.{block}." for block in (1, 3, 5)] + ["stages.3.attns.1."]
    for prefix, dim, heads, points in zip(
        replaced, (384,) * 3 + (768,), (12,) * 3 + (24,), keys[:1] * 3 + keys[1:], strict=True
    ):
        assert {key.removeprefix(prefix): ours[key] for key in ours if key.startswith(prefix)} == {
            "sampling_offsets.weight": (heads * points * 2, dim),
            "sampling_offsets.bias": (heads * points * 2,),
            "attention_weights.weight": (heads * points, dim),
            "attention_weights.bias": (heads * points,),
            "value_proj.weight": (dim, dim),
            "value_proj.bias": (dim,),
            "output_proj.weight": (dim, dim),
            "output_proj.bias": (dim,),
        }
    kept = [
        {key: shape for key, shape in shapes.items() if not key.startswith(tuple(replaced))}
        for shapes in (ours, dat)
    ]
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_a_variant_runs_from_official_weights_and_from_its_own(name):
    model, again = create_model(name), create_model(name)
    model.load_state_dict(official_state(name))
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits = model(images)
        torch.testing.assert_close(again(images), logits)
    assert 0.5 < logits.std() < 2
    assert cost(model).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_points_are_explained_in_pixels():
    """A layer without offsets looks at the middle of the patch of each query."""
    model = small()
    for layer in model.deformable_layers:
        for parameter in layer.attention.offset_proj.parameters():
            parameter.data.zero_()
    with torch.inference_mode():
        _, locations, _ = model.forward_explained(pictures(1, 4))
    layers = point_layers(model.config, model.config.image_size)
    for layer, layer_locations in zip(layers, locations, strict=True):
        side, points = 32 >> layer.stage, SMALL.stages[layer.stage].points
        explained = layer.points(layer_locations[0].numpy(), PixelMap((0, 0), (1.0, 1.0)))
        middle = (np.arange(side) + 0.5) * 128 / side
        expected = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 1, 2)
        heads = SMALL.stages[layer.stage].heads
        assert explained.sampling_locations.shape == (heads, side**2, points, 2)
        assert explained.reference_points.shape == (side**2, points, 2)
        for found in (*explained.sampling_locations, explained.reference_points):
            np.testing.assert_allclose(
                found, np.broadcast_to(expected, found.shape), atol=1e-4, rtol=0
            )
