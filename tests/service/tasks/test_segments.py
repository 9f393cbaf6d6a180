"""The forms of a label map agree with each other, whatever it holds."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from service.pictures.indexed import MOST_COLOURS, indexed_png
from service.tasks import segments
from service.tasks.segments import outlines, parts, run_lengths, turns, with_others_as_one

CLASSES = 5
SIDES = st.integers(1, 24)
label_maps = st.tuples(SIDES, SIDES).flatmap(
    lambda size: arrays.arrays(np.uint8, size, elements=st.integers(0, CLASSES - 1))
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools, NumPy 2


def filled(rings, size):
    """The even-odd rule: every vertical edge turns over all pixels to its right."""
    image = np.zeros(size, bool)
    for ring in rings:
        for (x, y), (_, next_y) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            image[min(y, next_y) : max(y, next_y), x:] ^= True
    return image


@given(label_maps)
def test_parts_say_how_many_pixels_there_are_and_where(labels):
    found = parts(labels, CLASSES)
    assert sorted(part.index for part in found) == np.unique(labels).tolist()
    order = [(-part.pixels, part.index) for part in found]
    assert order == sorted(order)
    for part in found:
        rows, columns = np.nonzero(labels == part.index)
        assert part.pixels == len(rows)
        assert part.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@given(label_maps)
def test_run_lengths_and_outlines_give_the_label_map_back(labels):
    found = parts(labels, CLASSES)
    runs = run_lengths(labels, [part.index for part in found])
    corners = 0
    for part, run in zip(found, runs, strict=True):
        own = labels == part.index
        assert run.image_size == labels.shape
        whole = coco.decode({"size": list(run.image_size), "counts": run.counts})
        np.testing.assert_array_equal(whole.astype(bool), own)
        assert coco.encode(np.asfortranarray(own.astype(np.uint8)))["counts"].decode() == run.counts
        rings = outlines(labels, part).rings
        np.testing.assert_array_equal(filled(rings, labels.shape), own)
        corners += sum(map(len, rings))
    # Where outlines turn, up to four classes have a corner, or two of them two.
    assert turns(labels) <= corners <= 4 * turns(labels)


@given(label_maps, st.sets(st.integers(0, CLASSES - 1)))
def test_an_indexed_png_is_the_label_map(labels, kept):
    colours = [(50 * n, 255 - 50 * n, n) for n in range(CLASSES)]
    chosen = with_others_as_one(labels, sorted(kept), CLASSES)
    wanted = np.isin(labels, list(kept))
    np.testing.assert_array_equal(chosen, np.where(wanted, labels, CLASSES))
    with Image.open(io.BytesIO(indexed_png(chosen, colours))) as file:
        assert file.mode == "P"
        np.testing.assert_array_equal(np.asarray(file), chosen)
        seen = np.asarray(file.convert("RGBA"))
    np.testing.assert_array_equal(seen[..., 3] == 255, wanted)
    assert (seen[wanted, :3] == np.array(colours)[labels[wanted]]).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 150, MOST_COLOURS])
def test_an_indexed_png_of_so_many_classes(classes):
    labels = np.arange(classes + 1, dtype=np.uint8).reshape(1, -1)
    with Image.open(io.BytesIO(indexed_png(labels, [(n, n, n) for n in range(classes)]))) as file:
        np.testing.assert_array_equal(np.asarray(file), labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_many_classes(dtype):
    """Of 256 the index behind the last is no byte."""
    classes = 256 if dtype == np.uint8 else 900
    labels = np.arange(classes).astype(dtype).reshape(-1, 4)
    assert len(parts(labels, classes)) == classes
    chosen = with_others_as_one(labels, [3], classes)
    assert np.unique(chosen).tolist() == [3, classes]
    (run,) = run_lengths(chosen, [3])
    whole = coco.decode({"size": list(run.image_size), "counts": run.counts})
    np.testing.assert_array_equal(np.argwhere(whole), [[0, 3]])


@given(label_maps)
def test_how_sure_labels_are_is_kept_as_bytes(values):
    with Image.open(io.BytesIO(segments.grey_png(values))) as file:
        assert file.mode == "L"
        np.testing.assert_array_equal(np.asarray(file), values)
