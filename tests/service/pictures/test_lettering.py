"""Labels lie beside their boxes, and none covers another."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.pictures.lettering import Wanted, font, place, printable

SIDES = st.integers(40, 1500)


@st.composite
def crowds(draw):
    """Boxes in a picture, some of them the same, with labels of any text."""
    width, height = draw(SIDES), draw(SIDES)
    corner = st.tuples(st.floats(-50, width + 50), st.floats(-50, height + 50))
    box = st.tuples(corner, corner).map(
        lambda two: (*map(min, zip(*two, strict=True)), *map(max, zip(*two, strict=True)))
    )
    boxes = draw(st.lists(box, min_size=1, max_size=12))
    boxes += draw(st.sampled_from([0, 1, 5])) * boxes[:1]
    texts = st.text(max_size=60)
    size = draw(st.integers(9, 40))
    return [Wanted(draw(texts), one, (230, 159, 0)) for one in boxes], (width, height), size


@settings(max_examples=40, deadline=None)
@given(crowds())
def test_no_label_covers_another_or_leaves_the_picture(crowd):
    wanted, picture, size = crowd
    labels = place(wanted, picture, size)
    for one, other in combinations(labels, 2):
        beside = one.left + one.width <= other.left or other.left + other.width <= one.left
        above = one.top + one.height <= other.top or other.top + other.height <= one.top
        assert beside or above
    for label in labels:
        assert 0 <= label.left <= label.left + label.width <= picture[0]
        assert 0 <= label.top <= label.top + label.height <= picture[1]
        assert font(size).getlength(label.text) <= label.width - 2 * label.padding + 1e-6


@settings(max_examples=40, deadline=None)
@given(crowds())
def test_the_first_label_lies_at_its_box_if_it_fits_into_the_picture(crowd):
    wanted, picture, size = crowd
    labels = place(wanted[:1], picture, size)
    ascent, descent = font(size).getmetrics()
    text = printable(wanted[0].text)
    if not text or ascent + descent + size > picture[1] or picture[0] < 6 * size:
        return
    (label,) = labels
    # Above the left corner of the box, or as near to that as the edge of the picture allows.
    x1, y1, _, _ = (round(side) for side in wanted[0].box)
    assert label.left == min(max(x1, 0), picture[0] - label.width)
    assert label.top == min(max(y1 - label.height, 0), picture[1] - label.height)


def test_labels_of_objects_that_lie_close_together_all_find_a_place():
    wanted = [
        Wanted(f"thing {n}", (100.0 + n, 100.0 + n, 160.0 + n, 160.0 + n), (0, 114, 178))
        for n in range(8)
    ]
    assert len(place(wanted, (400, 400), 14)) == 8


def test_a_label_that_finds_no_place_is_left_out_and_the_best_one_stays():
    wanted = [Wanted(f"thing {n}", (0.0, 0.0, 60.0, 20.0), (0, 114, 178)) for n in range(9)]
    labels = place(wanted, (80, 40), 14)
    assert 1 <= len(labels) < 9
    assert labels[0].text == "thing 0"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200))
def test_a_text_is_one_printable_line(text):
    clean = printable(text)
    assert clean.isprintable()
    assert len(clean) <= 40
    if text.isprintable() and len(text) <= 40:
        assert clean == text


def test_a_long_name_is_cut_to_the_picture():
    (label,) = place([Wanted("cinema, movie theater", (0, 0, 9, 9), (0, 0, 0))], (100, 100), 14)
    assert label.text.endswith("...")
    assert label.text.startswith("cinema")
