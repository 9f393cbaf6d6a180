"""The attention that is explained, against nested loops in float64 and against the pass itself."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DAT, VARIANTS, attention
from model.attention import DeformableAttention, DeformableAttentionPP
from model.attention_weights import Asked, most_attended_cells
from model.config import DatConfig, StageConfig
from model.detection import create_detector
from model.geometry import CHOSEN_QUERIES, MOST_QUERIES
from tests.conftest import SMALL_DAT, default_dtype, recipe_state

SIDES = st.integers(2, 4)


class Case(NamedTuple):
    """A deformable attention with random weights, in float64, and how it goes through queries."""

    attention: DeformableAttention
    banded: bool
    generator: torch.Generator


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    stage = StageConfig("D", 8 * groups, 2 * groups, groups, stride, 2 * stride + 1)
    family, kind = draw(
        st.sampled_from([("dat", DeformableAttention), ("dat_pp", DeformableAttentionPP)])
    )
    with default_dtype(torch.float64):
        # The table need not fit the map.
        made = kind(DatConfig("test", family, (stage,), (36, 36), 36, 3, 1), 0).eval()
        sides = st.integers(stride + 1, 5)  # at least two keys
        made.fit((draw(sides), draw(sides)))
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    return Case(made, draw(st.booleans()), generator)


def bilinear(table, y, x):
    """A table read between its cells, zero outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < table.shape[0] and 0 <= column < table.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * table[row, column]
    return total


def softmax_of_all(made, tokens, locations):
    """Softmax `(heads, HW, Ns)` of one image, one number after the other."""
    height, width, channels = tokens.shape
    groups, heads = made.offset_groups, made.heads
    size = channels // heads
    queries = made.q(tokens).detach().numpy().reshape(-1, heads, size)
    rows, columns = made.query_rows.numpy(), made.query_columns.numpy()
    points = locations.numpy().reshape(groups, -1, 2)
    per_group = channels // groups
    maps = tokens.numpy()
    sampled = np.zeros((points.shape[1], channels))
    for group in range(groups):
        for key, (y, x) in enumerate(points[group]):
            at = (y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)
            for channel in range(group * per_group, (group + 1) * per_group):
                sampled[key, channel] = bilinear(maps[..., channel], *at)
    keys = (sampled @ made.kv.weight.detach().numpy()[:channels].T).reshape(-1, heads, size)
    tables = made.relative_position_bias_table.detach().numpy()
    weights = np.zeros((heads, height * width, points.shape[1]))
    for head in range(heads):
        group = head // (heads // groups)
        table = tables[head]
        for query in range(height * width):
            logits = []
            for key, (y, x) in enumerate(points[group]):
                down = (rows[query // width] - y) / 2
                right = (columns[query % width] - x) / 2
                bias = bilinear(
                    table,
                    (down + 1) * (table.shape[0] - 1) / 2,
                    (right + 1) * (table.shape[1] - 1) / 2,
                )
                logits.append(queries[query, head] @ keys[key, head] + bias)
            exponentials = np.exp(np.array(logits) - max(logits))
            weights[head, query] = exponentials / exponentials.sum()
    return weights


@given(cases())
@settings(max_examples=12, deadline=None)
def test_weights_are_those_of_nested_loops(case):
    made, banded, generator = case
    (height, width), groups = made.size, made.offset_groups
    tokens = torch.randn(2, height, width, 8 * groups, dtype=torch.float64, generator=generator)
    cells = torch.randint(height * width, (2, MOST_QUERIES), generator=generator)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if banded:
            patch.setattr(attention, "BANDED_FROM", 0)
            patch.setattr(attention, "BAND", 2 * 2 * made._logits_of_row())  # two rows
        _, locations, given_weights = made(tokens, torch.zeros_like(tokens), Asked(cells))
    for image in range(2):
        expected = softmax_of_all(made, tokens[image], locations[image])
        by_group = expected.reshape(groups, -1, *expected.shape[1:]).sum(1)  # (G, HW, Ns)
        np.testing.assert_allclose(given_weights.received[image], by_group.sum(1), atol=1e-9)
        np.testing.assert_allclose(
            given_weights.weights[image], by_group[:, cells[image]].swapaxes(0, 1), atol=1e-9
        )
        assert given_weights.cells[image].tolist() == cells[image].tolist()


@given(st.tuples(SIDES, SIDES), st.integers(1, 3), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_the_cells_chosen_are_those_whose_points_receive_the_most(size, groups, count, data):
    (height, width), padded = size, data.draw(st.booleans())
    seed = data.draw(st.integers(0, 99))
    random = np.random.default_rng(seed)
    received = random.random((1, groups, count))
    locations = random.uniform(-1.2, 1.2, (1, groups, count, 1, 2))
    within = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    totals = np.zeros((height, width))
    for group in range(groups):
        for key in range(count):
            y, x = (locations[0, group, key, 0] + 1) / 2 * (height - 1, width - 1)
            row = min(range(height), key=lambda r, y=y: abs(r - y))
            column = min(range(width), key=lambda c, x=x: abs(c - x))
            totals[row, column] += received[0, group, key]
    if padded:
        totals[within[0] :] = totals[:, within[1] :] = -1
    chosen = most_attended_cells(
        torch.from_numpy(received),
        torch.from_numpy(locations),
        (height, width),
        torch.tensor([within]) if padded else None,
    )[0]
    assert len(set(chosen.tolist())) == CHOSEN_QUERIES
    best = np.sort(totals.ravel())[::-1][:CHOSEN_QUERIES]
    np.testing.assert_allclose(totals.ravel()[chosen.numpy()], best)


def asked(network, generator=None):
    """Half of the deformable layers, and cells for them: some of their own, some to be chosen."""
    layers = tuple(range(0, len(network.deformable_layers), 2))
    own = torch.randint(16, (2, len(layers), MOST_QUERIES - CHOSEN_QUERIES), generator=generator)
    ranks = (-1 - torch.arange(CHOSEN_QUERIES)).expand(2, len(layers), -1)
    return layers, torch.cat((own, ranks), 2)


@pytest.mark.parametrize("config", [SMALL_DAT, VARIANTS["dat_nano"]], ids=lambda c: c.name)
def test_an_answer_is_the_same_bit_for_bit_with_attention(config):
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config))
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, *config.image_size, generator=generator)
    layers, cells = asked(model, generator)
    with torch.inference_mode():
        plain = model.forward_explained(images)
        explained = model.forward_explained(images, layers, cells)
        received = [weights.received for weights in explained.attention]
    assert plain.attention == ()
    assert torch.equal(plain.logits, explained.logits)
    for ours, theirs in zip(explained.sampling_locations, plain.sampling_locations, strict=True):
        assert torch.equal(ours, theirs)
    for index, of_layer, weights in zip(layers, received, explained.attention, strict=True):
        stage, _, made = model.deformable_layers[index]
        # Every query gives each head one.
        heads = made.heads / made.offset_groups
        height, width = config.map_size(stage)
        torch.testing.assert_close(
            of_layer.sum(-1), torch.full(of_layer.shape[:2], height * width * heads)
        )
        assert (weights.cells[:, :-CHOSEN_QUERIES] < 16).all()
        chosen = most_attended_cells(
            of_layer, plain.sampling_locations[index], (height, width), None
        )
        assert torch.equal(weights.cells[:, -CHOSEN_QUERIES:], chosen)


def test_a_detector_finds_the_same_with_attention_and_chooses_no_padding():
    torch.manual_seed(2)
    detector = create_detector("mask_rcnn_dat_nano")
    images = torch.randn(2, 3, 128, 160)
    resized, scales = torch.tensor([[97, 160], [128, 33]]), torch.ones(2, 2)
    layers, cells = asked(detector)
    with torch.inference_mode():
        plain = detector.find(images, resized, scales)
        explained = detector.find(images, resized, scales, layers, cells)
    for ours, theirs in zip(explained.found, plain.found, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    for index, weights in zip(layers, explained.attention, strict=True):
        stage, _, _ = detector.deformable_layers[index]
        stride, first = detector.config.backbone.cell_geometry(stage)
        width = 160 // (4 << stage)
        for row in range(2):
            chosen = weights.cells[row, -CHOSEN_QUERIES:]
            centres = torch.stack((chosen // width, chosen % width), -1) * stride + first
            inside = (centres < resized[row]).all(-1)
            # The last map has few cells in the image; those are chosen before any other.
            room = math.prod(math.ceil((side - first) / stride) for side in resized[row].tolist())
            assert inside.sum() == min(CHOSEN_QUERIES, room)
            assert inside.tolist() == sorted(inside.tolist(), reverse=True)
