"""From positions in the image to cells of a map, and from weights back to points of the image."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model import VARIANTS
from model.detection import DETECTORS
from model.detection.transforms import Resizing
from model.geometry import CHOSEN_QUERIES, MOST_QUERIES
from model.transforms import Preprocessing
from service.engine.items import LayerAttention
from service.errors import InvalidOption
from service.tasks import attention
from service.tasks.attention import MOST_KEYS, AttentionOptions, Seen
from service.tasks.points import LayerPoints, point_layers

SIDES = st.integers(40, 3000)


@st.composite
def seen_images(draw):
    """An image of any size, cropped, squeezed, fitted or letterboxed into an input."""
    height, width = draw(SIDES), draw(SIDES)
    name = draw(st.sampled_from(["dat_nano", "dat_tiny_224", "dat_pp_base_384", "detector"]))
    if name == "detector":
        config = DETECTORS["mask_rcnn_dat_pp_tiny"]
        resizing = (
            Resizing.letterbox((height, width), 256)
            if draw(st.booleans())
            else config.resizing((height, width))
        )
        assume(resizing.fits)  # others are refused before
        return Seen(config.backbone, resizing.padded, resizing.resized, (height, width), resizing)
    config = VARIANTS[name]
    pixel_map = Preprocessing.of(config).pixel_map(width, height)
    return Seen(config, config.image_size, config.image_size, (height, width), pixel_map)


@given(seen_images(), st.data())
def test_a_query_is_the_cell_whose_centre_is_nearest_to_it_in_the_image(seen, data):
    height, width = seen.image_size
    points = st.tuples(st.floats(0, width), st.floats(0, height))
    queries = data.draw(st.lists(points, min_size=1, max_size=MOST_QUERIES))
    wanted, cells = attention.wanted(AttentionOptions(queries=tuple(queries)), seen)
    layers = point_layers(seen.config, seen.input_size)
    assert len(wanted.attention) == len(cells) == 2
    assert wanted.points
    for index, of_layer in zip(wanted.attention, cells, strict=True):
        layer = layers[index]
        columns, rows = layer.map_size
        centres = np.array(
            [
                layer.centre((row, column), seen.pixel_map)
                for row in range(rows)
                for column in range(columns)
                # Of cells behind the image none are taken, however near.
                if (layer.first_cell + layer.cell_stride * row < seen.resized[0] or not row)
                and (layer.first_cell + layer.cell_stride * column < seen.resized[1] or not column)
            ]
        )
        assert len(of_layer) == MOST_QUERIES
        for query, cell in zip(queries, of_layer, strict=False):
            at = divmod(cell, columns)
            for index_on_axis, side in zip(at, seen.resized, strict=True):
                centre_in_input = layer.first_cell + layer.cell_stride * index_on_axis
                assert centre_in_input < side or not index_on_axis
            centre = layer.centre(at, seen.pixel_map)
            ours = np.abs(np.subtract(centre, query))
            nearest = np.abs(centres - query)
            # Along each axis, because the two need not have one scale.
            assert (ours <= nearest.min(0) + 1e-6 * max(height, width)).all()


@given(seen_images())
def test_without_a_query_it_is_the_centre_of_the_image(seen):
    height, width = seen.image_size
    centre = AttentionOptions(queries=((width / 2, height / 2),))
    assert attention.wanted(AttentionOptions(), seen) == attention.wanted(centre, seen)


@given(st.floats(-2, 3), st.floats(-2, 3), seen_images())
def test_a_query_outside_of_the_image_is_refused(x, y, seen):
    height, width = seen.image_size
    options = AttentionOptions(queries=((x * width, y * height),))
    if 0 <= x * width <= width and 0 <= y * height <= height:
        attention.wanted(options, seen)
        return
    with pytest.raises(InvalidOption, match=f"outside of the image, which has {width}x{height}"):
        attention.wanted(options, seen)


def answer(options, seen, weights, cells):
    """What is explained of made-up weights `(Q, G, Ns)` in each layer, with made-up points."""
    wanted, _ = attention.wanted(options, seen)
    random = np.random.default_rng(0)
    points = [
        LayerPoints(
            layer.stage,
            layer.block,
            random.random((2, 3, 4, 2), np.float32) * 100,
            layer.reference_points,
        )
        for layer in point_layers(seen.config, seen.input_size)
    ]
    said = LayerAttention(np.array(cells), weights, weights.sum(0))
    explained = attention.explained(options, seen, [said] * len(wanted.attention), points)
    return explained, [points[index] for index in wanted.attention]


NANO = VARIANTS["dat_nano"]
SEEN = Seen(
    NANO, NANO.image_size, NANO.image_size, (146, 146), Preprocessing.of(NANO).pixel_map(146, 146)
)


@given(st.integers(0, 99), st.none() | st.integers(1, MOST_KEYS), st.booleans())
def test_keys_are_those_that_count_the_most_with_their_points(seed, top_n, ties):
    weights = np.random.default_rng(seed).random((MOST_QUERIES, 2, 12), np.float32)
    weights = weights.round(1) if ties else weights
    queries = ((70.0, 80.0), (10.0, 20.0))
    options = AttentionOptions(queries=queries, top_n=top_n)
    layers, points = answer(options, SEEN, weights, [5, 9, *[0] * 6])
    count = min(12, top_n or 8)
    for layer, of_layer in zip(layers, points, strict=True):
        keys_xy = of_layer.sampling_locations.reshape(2, 12, 2)
        np.testing.assert_array_equal(layer.received.reshape(2, 12), weights.sum(0))
        assert layer.received.shape == (2, 3, 4)
        assert len(layer.queries) == 2
        for index, query in enumerate(layer.queries):
            assert query.group_keys.shape == (2, count)
            for group in range(2):
                # Python sorts stably: of equal weights the first key comes first.
                best = sorted(range(12), key=lambda k, g=group, i=index: -weights[i, g, k])[:count]
                assert query.group_keys[group].tolist() == best
                np.testing.assert_array_equal(
                    query.group_weights[group], weights[index, group, best]
                )
                np.testing.assert_array_equal(query.group_points[group], keys_xy[group, best])
            total = weights[index].sum(0)
            best = sorted(range(12), key=lambda k, t=total: -t[k])[:count]
            assert query.keys.tolist() == best
            np.testing.assert_array_equal(query.weights, total[best])
            np.testing.assert_array_equal(query.points, keys_xy[:, best].swapaxes(0, 1))


def test_the_model_chooses_its_queries_inside_of_the_image():
    backbone = DETECTORS["mask_rcnn_dat_pp_tiny"].backbone
    resizing = Resizing.letterbox((100, 20), 256)  # 51 pixels wide of 256
    seen = Seen(backbone, resizing.padded, resizing.resized, resizing.image_size, resizing)
    options = AttentionOptions(queries="auto", layers=((3, 1),))
    _, cells = attention.wanted(options, seen)
    assert cells == ((-1, -2, -3, -4, 0, 0, 0, 0),)
    # The map has 8x8 cells, of which two columns lie in the image.
    chosen = [9, 10, 0, 2]
    assert len(chosen) == CHOSEN_QUERIES
    weights = np.ones((MOST_QUERIES, 2, 12), np.float32)
    (layer,), _ = answer(options, seen, weights, [*chosen, 0, 0, 0, 0])
    assert [query.cell for query in layer.queries] == [(1, 1), (0, 0)]
    assert [query.centre for query in layer.queries] == [
        pytest.approx((32.5 / resizing.scale_xy[0], 32.5 / resizing.scale_xy[1])),
        pytest.approx((0.5 / resizing.scale_xy[0], 0.5 / resizing.scale_xy[1])),
    ]


def test_the_layers_are_the_last_of_the_last_two_stages_or_as_named_in_their_order():
    def chosen(name, *layers):
        config = VARIANTS[name]
        seen = replace(SEEN, config=config, input_size=config.image_size)
        wanted, _ = attention.wanted(AttentionOptions(layers=layers), seen)
        places = [(layer.stage, layer.block) for layer in point_layers(config, config.image_size)]
        return [places[index] for index in wanted.attention]

    assert chosen("dat_nano") == [(2, 2), (3, 1)]
    assert chosen("dat_tiny_224") == [(2, 5), (3, 1)]
    assert chosen("dat_pp_base_224") == [(2, 17), (3, 1)]
    assert chosen("dat_pp_base_224", (3, 0), (0, 1)) == [(0, 1), (3, 0)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": ((2, 4),)}, r"dat_tiny_224 explains no layer 2\.4; there are 2\.1, 2\.3"),
        ({"layers": ((0, 0),)}, r"explains no layer 0\.0"),  # a window
        ({"layers": ((3, 1), (3, 1))}, "a layer twice"),
        ({"top_n": 0}, "top_n must be from 1 to 32, not 0"),
        ({"top_n": 33}, "top_n must be from 1 to 32, not 33"),
        ({"queries": ()}, "there are 0"),
        ({"queries": ((1.0, 1.0),) * 9}, "1 to 8 positions or auto; there are 9"),
        ({"queries": ((float("nan"), 1.0),)}, "not a number"),
        ({"queries": ((float("inf"), 1.0),)}, "not a number"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_a_sentence(options, sentence):
    config = VARIANTS["dat_tiny_224"]
    with pytest.raises(InvalidOption, match=sentence):
        attention.check(AttentionOptions(**options), config, asked=True, model="dat_tiny_224")
    with pytest.raises(InvalidOption, match="are for explain=attention"):
        attention.check(AttentionOptions(**options), config, asked=False, model="dat_tiny_224")


def test_too_many_layers_are_refused():
    layers = tuple((2, block) for block in range(1, 10, 2))
    config = VARIANTS["dat_pp_base_224"]
    with pytest.raises(InvalidOption, match="layers has 5 layers; at most 4"):
        attention.check(AttentionOptions(layers=layers), config, asked=True, model="m")


def test_a_model_without_deformable_attention_explains_none():
    for config in (
        VARIANTS["dat_tiny_224_ddetr"],  # whose queries have points of their own
        replace(
            NANO, stages=tuple(replace(one, blocks="N" * len(one.blocks)) for one in NANO.stages)
        ),
    ):
        with pytest.raises(InvalidOption, match="m has no deformable attention to explain"):
            attention.check(AttentionOptions(), config, asked=True, model="m")
        attention.check(AttentionOptions(), config, asked=False, model="m")
