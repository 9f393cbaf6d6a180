"""Windows of a Swin in pixels of the uploaded image."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.geometry import MOST_QUERIES
from model.swin_config import SwinConfig
from model.transforms import Preprocessing
from service.engine.items import LayerAttention, Wanted
from service.errors import InvalidOption
from service.tasks import attention
from service.tasks.attention import AttentionOptions, Seen
from service.tasks.windows import window_layers

SWIN = SwinConfig("swin", 8, (2, 1, 4), (1, 2, 4), window=4, image_size=(150, 128), num_classes=5)


@st.composite
def seen_images(draw):
    height, width = draw(st.integers(40, 3000)), draw(st.integers(40, 3000))
    config = replace(SWIN, crop=draw(st.booleans()))
    pixel_map = Preprocessing.of(config).pixel_map(width, height)
    return Seen(config, config.image_size, config.image_size, (height, width), pixel_map)


def made_up(layer, cells, seed=0):
    """Attention `(Q, heads, Ns)` that is nothing outside of the windows of its queries."""
    random = np.random.default_rng(seed)
    heads = SWIN.heads[layer.stage]
    weights = np.zeros((MOST_QUERIES, heads, np.prod(layer.windows.padded_size)), np.float32)
    width, _ = layer.map_size
    for of_query, cell in zip(weights, cells, strict=True):
        keys = layer.keys_seen(divmod(cell, width))
        of_query[:, keys] = random.dirichlet(np.ones(len(keys)), heads)
    return LayerAttention(np.array(cells), weights, weights.sum(0))


@settings(max_examples=30, deadline=None)
@given(seen_images(), st.data(), st.integers(1, 32))
def test_keys_are_cells_of_the_window_around_the_query(seen, data, top_n):
    height, width = seen.image_size
    points = st.tuples(st.floats(0, width), st.floats(0, height))
    queries = tuple(data.draw(st.lists(points, min_size=1, max_size=MOST_QUERIES)))
    options = AttentionOptions(queries=queries, layers=((1, 0), (2, 3)), top_n=top_n)
    wanted, cells = attention.wanted(options, seen)
    assert wanted == Wanted(points=False, attention=(1, 2))
    layers = window_layers(seen.config)
    said = [made_up(layers[i], of) for i, of in zip(wanted.attention, cells, strict=True)]
    answers = attention.explained(options, seen, said, ())
    assert [(answer.stage, answer.block) for answer in answers] == [(1, 0), (2, 3)]
    for answer, of_layer in zip(answers, said, strict=True):
        layer = layers[answer.stage]
        cell_size = layer.cell_stride * np.array(seen.pixel_map.scale)
        rows, columns = layer.windows.padded_size
        heads = SWIN.heads[answer.stage]
        assert answer.received.shape == (heads, rows, columns)
        assert len(answer.queries) == len(queries)
        for index, query in enumerate(answer.queries):
            x1, y1, x2, y2 = query.window
            assert x1 < query.centre[0] < x2
            assert y1 < query.centre[1] < y2
            across, down = np.round(np.array([x2 - x1, y2 - y1]) / cell_size, 3)
            assert {across, down} <= {2, 4}
            assert query.cell_size == pytest.approx(cell_size, rel=1e-5)
            assert len(query.keys) == min(top_n, across * down)
            assert query.group_keys.shape == (heads, len(query.keys))
            assert query.points.shape == (len(query.keys), heads, 2)
            weights = of_layer.weights[index]
            for keys, found, total, places in (
                *zip(
                    query.group_keys,
                    query.group_weights,
                    weights,
                    query.group_points,
                    strict=True,
                ),
                (query.keys, query.weights, weights.sum(0), query.points[:, 0]),
            ):
                np.testing.assert_allclose(found, np.sort(total)[::-1][: len(keys)], rtol=1e-5)
                np.testing.assert_allclose(found, total[keys], rtol=1e-5)
                row_column = np.stack(np.divmod(keys, columns), 1)
                own = np.array(query.centre) + cell_size * (row_column - query.cell)[:, ::-1]
                np.testing.assert_allclose(places, own, rtol=1e-5, atol=1e-3)
                assert ((places > (x1, y1)) & (places < (x2, y2))).all()
            assert (query.points == query.points[:, :1]).all()


@settings(max_examples=15, deadline=None)
@given(seen_images())
def test_windows_tile_the_input(seen):
    for layer in window_layers(seen.config)[1:]:
        rows, columns = map(range, layer.windows.padded_size)
        boxes = {layer.window((row, column), seen.pixel_map) for row in rows for column in columns}
        area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes)
        cell = layer.cell_stride**2 * np.prod(seen.pixel_map.scale)
        assert area == pytest.approx(cell * np.prod(layer.windows.padded_size))


def test_the_cells_that_receive_the_most_are_asked_for():
    pixel_map = Preprocessing.of(SWIN).pixel_map(300, 300)
    seen = Seen(SWIN, SWIN.image_size, SWIN.image_size, (300, 300), pixel_map)
    wanted, cells = attention.wanted(AttentionOptions(queries="auto"), seen)
    assert wanted.attention == (1, 2)
    assert cells == ((-1, -2, -3, -4, 0, 0, 0, 0),) * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": ((2, 2),)}, r"m explains no layer 2\.2; there are 0\.1, 1\.0, 2\.3"),
        ({"layers": ((3, 0),)}, r"m explains no layer 3\.0"),
        ({"top_n": 33}, "top_n must be from 1 to 32, not 33"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_a_sentence(options, sentence):
    with pytest.raises(InvalidOption, match=sentence):
        attention.check(AttentionOptions(**options), SWIN, asked=True, model="m")
