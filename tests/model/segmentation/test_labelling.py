"""Labels of pixels: what is done in strips is the same as in one, and takes little memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.segmentation import labelling
from model.segmentation.labelling import Pass, _TwoResizings, full_logits, label_pixels
from tests.server import ROOT

TIE = 1e-4  # a margin that rounding can turn


def whole(passes, image_size, *, confidence=False):
    """Labels in one strip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "STRIP", 10**12)
        return label_pixels(passes, image_size, confidence=confidence)


def one_pass(cells, input_size, classes=6, seed=0, **others):
    generator = torch.Generator().manual_seed(seed)
    return Pass(torch.randn(*cells, classes, generator=generator) * 3, input_size, **others)


def smooth_pass(cells, input_size, classes):
    """As a network answers: most classes are nowhere near."""
    coarse = one_pass((3, 4), input_size, classes).logits.permute(2, 0, 1)
    fine = F.interpolate(coarse[None], cells, mode="bicubic")[0]
    return Pass(fine.permute(1, 2, 0).contiguous() * 4, input_size)


sides = st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.integers(2, 9),
    st.tuples(st.integers(0, 999), st.booleans()),
    st.integers(1, 2000),
)
def test_strips_give_the_labels_of_the_whole(input_size, image_size, classes, drawing, strip):
    seed, mirrored = drawing
    cells = tuple(-(-side // 4) for side in input_size)
    passes = [one_pass(cells, input_size, classes, seed, mirrored=mirrored)]
    several = [*passes, one_pass((5, 3), (17, 11), classes, seed + 1)]
    for given_passes, confidence in ((passes, False), (passes, True), (several, True)):
        expected = whole(given_passes, image_size, confidence=confidence)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(labelling, "STRIP", strip)
            ours = label_pixels(given_passes, image_size, confidence=confidence)
        for part, of_whole in zip(ours, expected, strict=True):
            assert part is of_whole is None or torch.equal(part, of_whole)


@settings(deadline=None, max_examples=40)
@given(st.tuples(sides, sides), st.tuples(sides, sides), st.integers(0, 999))
def test_a_class_that_is_left_out_is_the_largest_nowhere(input_size, image_size, seed):
    """And what is left out is not too little: of a smooth map most classes are."""
    cells = tuple(-(-side // 4) for side in input_size)
    one = one_pass(cells, input_size, 9, seed)
    labels = full_logits(one, image_size).argmax(-1)
    assert torch.equal(label_pixels([one], image_size).labels, labels.to(torch.uint8))


def test_classes_that_are_nowhere_near_are_left_out():
    one = smooth_pass((40, 60), (160, 240), 40)
    contenders = _TwoResizings(one, (320, 480)).contenders(slice(100, 108))
    assert 1 <= len(contenders) < 30
    largest = full_logits(one, (320, 480))[100:108].argmax(-1).unique()
    assert set(largest.tolist()) <= set(contenders.tolist())


@pytest.mark.parametrize("make", [one_pass, smooth_pass])
def test_confidence_is_that_of_all_classes(make):
    """Though classes whose probability is nothing are left out."""
    one = make((40, 60), (160, 240), 40)
    said = label_pixels([one], (301, 223), confidence=True)
    probabilities = full_logits(one, (301, 223)).softmax(-1)
    best = probabilities.topk(2).values
    torch.testing.assert_close(said.probabilities, best[..., 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(said.margins, best[..., 0] - best[..., 1], rtol=0, atol=1e-5)


def official_logits(one, image_size):
    """Both resizings as torch does them, whole."""
    maps = one.logits.permute(2, 0, 1)[None]
    for size in (one.input_size, image_size):
        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return maps[0].permute(1, 2, 0)


@pytest.mark.parametrize("image_size", [(301, 223), (97, 61), (160, 240), (1000, 40)])
@pytest.mark.parametrize("make", [one_pass, smooth_pass])
def test_labels_are_those_of_two_whole_resizings(make, image_size):
    one = make((40, 60), (157, 238), classes=20)
    expected = official_logits(one, image_size)
    torch.testing.assert_close(full_logits(one, image_size), expected, rtol=1e-5, atol=1e-4)
    labels = label_pixels([one], image_size).labels.long()
    differ = labels != expected.argmax(-1)
    first, second = expected.topk(2).values.unbind(-1)
    assert differ.float().mean() < 1e-4
    assert not differ[first - second > TIE].any()


def test_one_resizing_would_be_another():
    one = one_pass((40, 60), (157, 238), classes=20)
    once = F.interpolate(one.logits.permute(2, 0, 1)[None], (301, 457), mode="bilinear")[0]
    labels = label_pixels([one], (301, 457)).labels.long()
    assert (labels != once.argmax(0)).float().mean() > 1e-3


def test_several_passes_are_averaged_as_probabilities():
    passes = [
        one_pass((10, 12), (40, 48), seed=1),
        one_pass((10, 12), (40, 48), seed=2, mirrored=True),
        one_pass((5, 6), (20, 24), seed=3),
    ]
    ours = label_pixels(passes, (30, 50), confidence=True)
    each = [official_logits(one, (30, 50)).softmax(-1) for one in passes]
    each[1] = each[1].flip(1)
    mean = torch.stack(each).mean(0)
    first, second = mean.topk(2).values.unbind(-1)
    torch.testing.assert_close(ours.probabilities, first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.margins, first - second, rtol=1e-4, atol=1e-5)
    clear = first - second > TIE
    assert torch.equal(ours.labels[clear].long(), mean.argmax(-1)[clear])


def test_of_equals_the_lowest_index_is_taken():
    logits = torch.zeros(4, 4, 5)
    logits[..., 2:4] = 1
    for confidence in (False, True):
        ours = label_pixels([Pass(logits, (16, 16))], (20, 20), confidence=confidence)
        assert (ours.labels == 2).all()


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_labels_take_a_byte_where_that_is_enough(classes, dtype):
    logits = torch.zeros(2, 2, classes)
    logits[..., -1] = 1
    labels = label_pixels([Pass(logits, (8, 8))], (9, 9)).labels
    assert labels.dtype == dtype
    assert (labels == classes - 1).all()


PHOTO = """
import resource, sys
import torch
from tests.model.segmentation.test_labelling import one_pass, smooth_pass
from model.segmentation.labelling import label_pixels
make = smooth_pass if sys.argv[1] == "smooth" else one_pass
one = make((128, 171), (512, 683), 150)
label_pixels([one], (60, 80))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
label_pixels([one], (3000, 4000))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("drawing", ["smooth", "noise"])
def test_a_photo_of_twelve_megapixels_takes_megabytes(drawing):
    """All its logits would be 7.2 GB; the labels are 12 MB."""
    ended = subprocess.run(
        [sys.executable, "-c", PHOTO, drawing], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 100
