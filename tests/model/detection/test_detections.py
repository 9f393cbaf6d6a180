"""What counts as found, against a search image by image without any padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection import nms
from model.detection.boxes import decode
from model.detection.detections import Found, select, select_entries


def oracle(regions, scores, deltas, limit, scale):
    """One image, as mmdetection 2.26: rows `(x1, y1, x2, y2, score, label)`, best first."""
    region, label = (scores[:, :-1] > 0.05).nonzero(as_tuple=True)
    boxes = decode(regions[region], deltas[region, label], limit) / scale.repeat(2)
    chosen = scores[region, label]
    order = (-chosen).argsort(stable=True)
    waiting = torch.cat((boxes, chosen[:, None], label[:, None].float()), 1)[order].numpy()
    apart = waiting[:, 5:] * (waiting[:, :4].max(initial=0) + np.float32(1))
    moved = waiting[:, :4] + apart
    found = []
    while len(waiting) and len(found) < 100:
        found.append(waiting[0])
        left = ~(overlaps(moved[0], moved) > np.float32(0.5))
        left[0] = False
        waiting, moved = waiting[left], moved[left]
    return np.array(found, np.float32).reshape(-1, 6)


def overlaps(box, others):
    start, end = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inter = np.maximum(end - start, 0).prod(1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (box, others)]
    with np.errstate(invalid="ignore"):
        return inter / (areas[0] + areas[1] - inter)


def check(regions, counts, scores, deltas):
    B = len(regions)
    limits = torch.tensor([[100.0, 80.0], [120.0, 60.0]])[:B]
    scales = torch.tensor([[1.0, 1.0], [0.5, 0.75]])[:B]
    given = regions, torch.tensor(counts), scores, deltas
    found = select_entries(*given, limits=limits, scales_xy=scales)
    for image, one in enumerate(found.of_images()):
        real = slice(counts[image])
        expected = oracle(
            *(part[image, real] for part in (regions, scores, deltas)), limits[image], scales[image]
        )
        rows = torch.cat((one.boxes, one.scores[:, None], one.labels[:, None]), 1)
        np.testing.assert_array_equal(rows, expected)
    return found


def entries(B, R, K, seed):
    """Regions that often overlap and classes that are often sure."""
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(B, R, 2, generator=random) * 60
    sides = 5 + torch.rand(B, R, 2, generator=random) * 40
    logits = torch.randn(B, R, K + 1, generator=random) * 2
    deltas = torch.randn(B, R, K, 4, generator=random) * 0.1
    return torch.cat((corners, corners + sides), -1), logits.softmax(-1), deltas


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=2),
    st.sampled_from([1, 3, 25]),
    st.integers(0, 2**31),
)
def test_a_batch_finds_what_its_images_do(counts, K, seed):
    check_entries = entries(len(counts), 30, K, seed)
    regions, scores, deltas = check_entries
    check(regions, counts, scores, deltas)


@pytest.fixture
def fixed_rows(monkeypatch):
    """As on a device, where the length of the rows depends on no data."""
    monkeypatch.setattr(nms, "needed", lambda counts, most: most)


@pytest.mark.usefixtures("fixed_rows")
@pytest.mark.parametrize("classes", [19, 20])
def test_as_many_classes_as_a_region_can_have(classes):
    """Thousands of boxes in one place come before the others, which must still be found."""
    regions, _, deltas = entries(1, 1000, 80, 0)
    regions[:, :700] = torch.tensor([10.0, 10.0, 40.0, 40.0])
    deltas[:, :700] = 0
    scores = torch.full((1, 1000, 81), 1e-4)
    # The next number after the threshold: 20 of them are a little more than 1.
    least = torch.tensor(0.05).nextafter(torch.tensor(1.0))
    scores[:, :700, :classes] = 0.0502 if classes == 19 else least
    others = torch.linspace(0.0501, 0.05005, 300)[:, None] if classes == 19 else least
    scores[:, 700:, 30 : 30 + classes] = others
    found = check(regions, [1000], scores, deltas)
    assert (found.labels >= 30).sum() > 50


def test_equal_scores_stay_in_the_order_of_regions_and_classes():
    regions, _, deltas = entries(1, 200, 4, 3)
    found = check(regions, [200], torch.full((1, 200, 5), 0.2), deltas)
    assert len(set(found.labels[0].tolist())) == 4


def test_regions_past_the_count_and_scores_without_a_number_are_nothing():
    regions, scores, deltas = entries(2, 30, 3, 0)
    scores[0, 4], scores[1] = torch.nan, torch.nan
    regions[0, 20:] = deltas[0, 20:] = torch.nan
    found = check(regions, [20, 30], scores, deltas)
    assert found.counts[0] > 3
    assert found.counts[1] == 0


def test_rows_of_fixed_length_hold_the_same(request):
    regions, scores, deltas = entries(2, 30, 25, 1)
    limits, scales = torch.tensor([[100.0, 80.0]] * 2), torch.ones(2, 2)
    counts = torch.tensor([15, 5])

    def find():
        chosen = {"limits": limits, "scales_xy": scales}
        return select_entries(regions, counts, scores, deltas, **chosen)

    short = find()
    request.getfixturevalue("fixed_rows")
    padded = find()
    assert short.labels.shape[1] == max(short.counts.tolist()) < 100
    assert padded.labels.shape == (2, 100)
    assert padded.counts.tolist() == short.counts.tolist()
    for one, other in zip(short.of_images(), padded.of_images(), strict=True):
        for part in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(one, part), getattr(other, part))
    for image, count in enumerate(padded.counts.tolist()):
        assert not any(part[image, count:].any() for part in padded[:3])


def test_a_box_without_a_number_keeps_all_others():
    """The largest coordinate is none either, and nothing is known to overlap."""
    boxes = torch.tensor([[0.0, 0, 9, 9]] * 3 + [[torch.nan] * 4])[None]
    found = select(boxes, torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[0, 0, 1, 1]]))
    assert found.counts.tolist() == [4]


def test_images_are_copies():
    """What a graph writes next does not change what was found."""
    boxes = torch.ones(1, 2, 4)
    found = Found(boxes, torch.ones(1, 2), torch.ones(1, 2), torch.tensor([1]))
    (image,) = found.of_images()
    boxes.zero_()
    assert image.boxes.tolist() == [[1.0] * 4]


def test_a_score_at_the_threshold_is_not_enough():
    least = torch.tensor(0.05)
    scores = torch.stack((least, least.nextafter(torch.tensor(1.0))))[None]
    boxes = torch.tensor([[[0.0, 0, 9, 9], [20, 20, 30, 30]]])
    found = select(boxes, scores, torch.zeros(1, 2, dtype=torch.int64))
    assert found.boxes.tolist() == [[[20.0, 20, 30, 30]]]
