"""Single operators and miniature heads against the official ones and against nested loops."""

import re
from dataclasses import replace
from math import ceil, floor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.checkpoint import Checkpoint
from model.feature_pyramid import FeaturePyramid, upsampled
from model.fused import convolve, linear
from model.official import apply
from model.openmmlab import convolution_norm_rules
from model.resizing import resize_bilinear
from model.segmentation.classes import class_colours, overlay
from model.segmentation.fusion import fused_levels
from model.segmentation.labelling import Pass, full_logits, label_pixels
from model.segmentation.official import head_rules
from model.segmentation.resize import resized
from model.segmentation.semantic_fpn import Branch, SemanticFpnHead
from model.segmentation.transforms import Resizing
from model.segmentation.upernet import POOLED_SIDES, PyramidPooling, UperNetHead, mean_pooled
from tests.model.segmentation.conftest import small_config
from tests.model.segmentation.test_labelling import whole

TOLERANCE = 1e-5  # of the largest value

sides = st.integers(1, 12)
maps = st.tuples(sides, sides, st.integers(0, 2**32 - 1))


def assert_close(ours, expected):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max()


def tokens(operators, name):
    return torch.from_numpy(operators[name]).permute(0, 2, 3, 1).contiguous()


def assert_tokens(operators, name, ours):
    assert_close(ours.detach().permute(0, 3, 1, 2), operators[name])


def names_with(operators, pattern):
    return sorted(name for name in operators.files if re.fullmatch(pattern, name))


def test_means_of_bins(operators):
    cases = names_with(operators, r"pool_\d+x\d+_in")
    assert len(cases) >= 4
    for case in cases:
        for side in POOLED_SIDES:
            ours = mean_pooled(tokens(operators, case), side)
            assert_tokens(operators, case.replace("_in", f"_{side}"), ours)


def drawn(height, width, seed, channels=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, height, width, channels, generator=generator)


@settings(deadline=None, max_examples=40)
@given(maps, st.integers(1, 8))
def test_bins_overlap_where_they_do_not_divide_the_map(drawing, side):
    given_map = drawn(*drawing)
    _, height, width, _ = given_map.shape
    expected = torch.empty(1, side, side, 2)
    for row in range(side):
        rows = range(floor(row * height / side), ceil((row + 1) * height / side))
        for column in range(side):
            columns = range(floor(column * width / side), ceil((column + 1) * width / side))
            cells = [given_map[0, y, x] for y in rows for x in columns]
            expected[0, row, column] = torch.stack(cells).mean(0)
    torch.testing.assert_close(mean_pooled(given_map, side), expected)


def test_bilinear_resizing(operators):
    cases = names_with(operators, r"bilinear_\w+_in")
    assert len(cases) >= 7
    for case in [*cases, "double_in"]:
        expected = operators[case.replace("_in", "_out")]
        ours = resized(tokens(operators, case), expected.shape[2:])
        assert_tokens(operators, case.replace("_in", "_out"), ours)


def between(index, size, new_size):
    """The two cells of an axis around a new one, and the weight of the second."""
    at = max((index + 0.5) * size / new_size - 0.5, 0.0)
    return floor(at), min(floor(at) + 1, size - 1), at - floor(at)


def resized_by_loops(given_map, size):
    _, height, width, channels = given_map.shape
    expected = torch.empty(1, *size, channels)
    for row in range(size[0]):
        top, bottom, down = between(row, height, size[0])
        for column in range(size[1]):
            left, right, across = between(column, width, size[1])
            above = given_map[0, top, left] * (1 - across) + given_map[0, top, right] * across
            below = given_map[0, bottom, left] * (1 - across) + given_map[0, bottom, right] * across
            expected[0, row, column] = above * (1 - down) + below * down
    return expected


@settings(deadline=None, max_examples=40)
@given(maps, st.tuples(sides, sides))
def test_bilinear_resizing_is_between_cells_as_areas(drawing, size):
    given_map = drawn(*drawing)
    expected = resized_by_loops(given_map, size)
    torch.testing.assert_close(resized(given_map, size), expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(maps, st.tuples(sides, sides), st.tuples(sides, sides))
def test_logits_of_pixels_are_resized_twice(drawing, input_size, image_size):
    cells = drawn(*drawing)
    expected = resized_by_loops(resized_by_loops(cells, input_size), image_size)
    ours = full_logits(Pass(cells[0], input_size), image_size)
    torch.testing.assert_close(ours, expected[0], rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(sides, sides), min_size=2, max_size=4), st.integers(1, 2), st.integers())
def test_levels_are_convolved_as_if_they_were_resized_before(sizes, images, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    channels = range(2, 2 + len(sizes))
    levels = [
        torch.randn(images, *size, count, generator=generator)
        for size, count in zip(sizes, channels, strict=True)
    ]
    conv = torch.nn.Conv2d(sum(channels), 4, 3, padding=1)
    together = torch.cat([resized(tokens, sizes[0]) for tokens in levels], -1)
    expected = conv(together.permute(0, 3, 1, 2)).relu().permute(0, 2, 3, 1)
    with torch.inference_mode():
        torch.testing.assert_close(fused_levels(conv, levels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_levels(conv, levels), expected, rtol=1e-4, atol=1e-5)


def test_nearest_upsampling(operators):
    cases = names_with(operators, r"nearest_\w+_in")
    assert len(cases) >= 4
    for case in cases:
        name = case.replace("_in", "_out")
        assert_tokens(operators, name, upsampled(tokens(operators, case), tokens(operators, name)))


@settings(deadline=None, max_examples=40)
@given(maps, st.tuples(sides, sides))
def test_the_nearest_cell_is_found_by_rounding_down(drawing, size):
    given_map = drawn(*drawing)
    _, height, width, _ = given_map.shape
    ours = upsampled(given_map, torch.empty(1, *size, 1))
    for row in range(size[0]):
        for column in range(size[1]):
            cell = given_map[0, row * height // size[0], column * width // size[1]]
            assert torch.equal(ours[0, row, column], cell)


@pytest.mark.parametrize(("name", "side"), [("cm3", 3), ("cm1", 1)])
def test_a_norm_is_folded_into_the_convolution_before_it(operators, name, side):
    shape = operators[f"{name}_conv.weight"].shape
    rules = convolution_norm_rules("folded", name, *shape)
    given_map = tokens(operators, f"{name}_in")
    layer = torch.nn.Conv2d(shape[1], shape[0], side, padding=side // 2)
    if side == 1:
        layer = torch.nn.Linear(shape[1], shape[0])
    load(layer, rules, "folded.", operators, lambda source: source.replace(".", "_", 1))
    with torch.inference_mode():
        call = linear if side == 1 else convolve
        assert_tokens(operators, f"{name}_out", call(layer, given_map, "relu"))


def load(module, rules, prefix, operators, stored_name):
    """Load a part with official weights that are stored under names of their own."""
    rules = list(rules)
    state = {
        source: torch.from_numpy(operators[stored_name(source)])
        for rule in rules
        for source in rule.sources
    }
    folded = apply(rules, state)
    module.load_state_dict({key.removeprefix(prefix): v.float() for key, v in folded.items()})


@pytest.mark.parametrize("size", ["7x9", "3x10"])
def test_pooled_branches(operators, size):
    pooling = PyramidPooling(6, 4).eval()
    for index, branch in enumerate(pooling.branches):
        rules = convolution_norm_rules("branch", f"ppm_{index}.1", 4, 6, 1, 1)
        load(branch, rules, "branch.", operators, str)
    with torch.inference_mode():
        for index, ours in enumerate(pooling.pooled(tokens(operators, f"ppm_{size}_in"))):
            assert_tokens(operators, f"ppm_{size}_out_{index}", ours)


def miniature(kind, **changes):
    """A configuration for the maps of the miniature heads."""
    config = replace(small_config(kind), num_classes=5, **changes)
    stages = zip(config.backbone.stages, (4, 5, 6, 7), strict=True)
    backbone = replace(
        config.backbone, stages=tuple(replace(stage, dim=dim) for stage, dim in stages)
    )
    return replace(config, backbone=backbone)


def head_maps(operators):
    return [tokens(operators, f"heads_in_{level}") for level in range(4)]


def test_a_miniature_of_upernet(operators):
    config = miniature("upernet", channels=6)
    head = UperNetHead(config).eval()
    load(
        head,
        head_rules(config),
        "decode_head.",
        operators,
        lambda source: source.replace("decode_head.", "uper_"),
    )
    with torch.inference_mode():
        assert_tokens(operators, "uper_out", head(head_maps(operators)))


def test_a_miniature_of_semantic_fpn(operators):
    config = miniature("semantic_fpn", channels=4, pyramid_channels=6)
    head = SemanticFpnHead(config).eval()
    load(
        head,
        head_rules(config),
        "decode_head.",
        operators,
        lambda source: source.replace("neck.", "neck_").replace("decode_head.", "fpnhead_"),
    )
    with torch.inference_mode():
        for level, ours in enumerate(head.pyramid(head_maps(operators))):
            assert_tokens(operators, f"neck_out_{level}", ours)
        assert_tokens(operators, "fpnhead_out", head(head_maps(operators)))


def test_a_level_may_grow_beyond_the_finest_one():
    """Seven rows are four, two and one of the coarser levels, which become eight."""
    grown = Branch(3, 3, 3, grows=True)(torch.zeros(1, 1, 2, 3))
    assert grown.shape == (1, 8, 16, 3)
    pyramid = FeaturePyramid((2, 2), 3)
    levels = pyramid([torch.zeros(1, 7, 5, 2), torch.zeros(1, 4, 3, 2)])
    assert [level.shape for level in levels] == [(1, 7, 5, 3), (1, 4, 3, 3)]


@pytest.mark.parametrize("case", ["final_up", "final_down"])
def test_logits_become_labels(operators, case):
    logits = tokens(operators, f"{case}_logits")[0]
    one = Pass(logits, tuple(operators[f"{case}_input_hw"].tolist()))
    size = tuple(operators[f"{case}_ori_hw"].tolist())
    expected = np.squeeze(operators[f"{case}_full_logits"])
    assert_close(full_logits(one, size).permute(2, 0, 1), expected)
    stored = np.squeeze(operators[f"{case}_labels"])
    assert (label_pixels([one], size).labels.numpy() == stored).all()
    found = label_pixels([one], size, confidence=True)
    probabilities = np.squeeze(operators[f"{case}_probability"]).astype(np.float32)
    assert np.abs(found.probabilities.numpy() - probabilities.max(0)).max() < 1e-3  # of float16
    *_, second, first = np.sort(probabilities, 0)
    assert np.abs(found.margins.numpy() - (first - second)).max() < 2e-3
    assert (found.labels.numpy() == stored).all()
    assert torch.equal(found.labels, whole([one], size).labels)


def test_sizes_of_resized_pictures(operators):
    for size, expected in zip(
        operators["rescale_in_hw"].tolist(), operators["rescale_out_hw"].tolist(), strict=True
    ):
        assert list(Resizing(tuple(size)).resized) == expected


def test_sizes_at_several_scales(operators):
    config = small_config("upernet")
    config = replace(config, scale=(2048, 512))
    for ratio, scale, size in zip(
        operators["multiscale_ratios"].tolist(),
        operators["multiscale_scales"].tolist(),
        operators["multiscale_out_hw_for_480x640"].tolist(),
        strict=True,
    ):
        resizing = config.resizing((480, 640), ratio)
        assert [resizing.long_side, resizing.short_side] == scale
        assert list(resizing.resized) == size


@pytest.mark.parametrize("name", ["up", "down"])
def test_pictures_are_resized_to_the_bit(operators, name):
    picture = operators["resize_in"]
    long_side, short_side = operators[f"resize_{name}_scale"].tolist()
    resizing = Resizing(picture.shape[:2], long_side, short_side)
    expected = operators[f"resize_{name}_out"]
    assert resizing.resized == expected.shape[:2]
    assert (resize_bilinear(picture, resizing.resized) == expected).all()


def test_colours_lie_over_a_picture(operators):
    palette = class_colours(Checkpoint(Path("upn_tiny.pth"), {}), 150)
    drawn_over = overlay(operators["resize_in"], operators["overlay_labels"], palette)
    assert (drawn_over == operators["overlay_out"]).all()
