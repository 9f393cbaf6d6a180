"""Colours stand out on any photo, and from each other for everybody."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.pictures.colours import BLACK, PALETTE, WHITE, colour_of, contrast, ink_on

COLOURS = st.tuples(*[st.integers(0, 255)] * 3)

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Of CIE 1976: 2.3 can just be noticed side by side.
CLEARLY_APART = 10.0


def lab(linear):
    """CIELAB of linear sRGB, D65."""
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    ratio = to_xyz @ linear / (to_xyz @ np.ones(3))
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def seen(colour, matrix):
    channels = np.array(colour) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return lab((np.array(matrix) @ linear).clip(0, 1))


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_everybody_tells_the_colours_apart(deficiency):
    matrix = DEFICIENCIES[deficiency]
    for one, other in combinations(PALETTE, 2):
        distance = np.linalg.norm(seen(one, matrix) - seen(other, matrix))
        assert distance > CLEARLY_APART, (one, other, distance)


@given(COLOURS)
def test_an_edge_or_a_halo_stands_out_wherever_a_shape_lies(background):
    assert max(contrast(background, WHITE), contrast(background, BLACK)) >= 4.5


@given(COLOURS)
def test_text_can_be_read_on_every_plate(paper):
    assert contrast(ink_on(paper), paper) >= 4.5


@given(COLOURS, COLOURS)
def test_contrast_is_that_of_the_guidelines(one, other):
    assert contrast(one, other) == contrast(other, one)
    assert 1 <= contrast(one, other) <= 21
    assert contrast(BLACK, WHITE) == pytest.approx(21)
    assert contrast((119, 119, 119), WHITE) == pytest.approx(4.48, abs=0.005)  # known from WCAG


@given(st.integers(0, 10_000))
def test_there_are_eight_colours_and_then_the_first_again(index):
    assert colour_of(index) == colour_of(index % 8)
    assert len({colour_of(n) for n in range(8)}) == 8
