"""Single operators against the official ones, on their golden cases."""

import json

import numpy as np
import pytest
import torch

from model.attention import DeformableAttentionPP
from model.config import DatConfig, StageConfig
from model.detection.anchors import RETINANET_ANCHORS, RPN_ANCHORS
from model.detection.boxes import decode
from model.detection.detections import select
from model.detection.masks import THRESHOLD, paste, paste_whole
from model.detection.nms import moved_apart, nms
from model.detection.roi_align import level_of, pooled_features
from model.detection.transforms import Resizing
from model.local_attention import NeighborhoodAttention
from model.official import apply, block_rules
from model.resizing import resize_bilinear

TOLERANCE = 1e-5


def assert_close(ours, expected):
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=TOLERANCE, atol=TOLERANCE)


def tensor(operators, name):
    return torch.from_numpy(operators[name])


@pytest.mark.parametrize(("stds", "expected"), [(True, "decode_out"), (False, "decode_out_stds1")])
def test_boxes_are_decoded_and_clipped(operators, stds, expected):
    height, width = operators["decode_max_shape_hw"]
    boxes = tensor(operators, "decode_boxes")[:, None]
    deltas = tensor(operators, "decode_deltas").view(-1, 2, 4)
    limits = torch.tensor([width, height], dtype=torch.float32)
    decoded = decode(boxes, deltas, limits, operators["decode_stds"].tolist() if stds else ())
    expected = operators[expected].reshape(-1, 2, 4)
    np.testing.assert_allclose(decoded, expected, rtol=TOLERANCE, atol=TOLERANCE * width)


@pytest.mark.parametrize(("name", "anchors"), [("retina", RETINANET_ANCHORS), ("rpn", RPN_ANCHORS)])
def test_anchors(operators, name, anchors):
    for level, (height, width) in enumerate(operators["anchor_sizes_hw"].tolist()):
        every = torch.arange(height * width * anchors.per_cell)
        boxes = anchors.at(level, width, every)
        expected = operators[f"anchors_{name}_{level}"]
        np.testing.assert_allclose(boxes, expected, rtol=TOLERANCE, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms_keeps_the_same_boxes_in_the_same_order(operators, threshold):
    boxes, scores = tensor(operators, "nms_boxes"), tensor(operators, "nms_scores")
    kept = nms(boxes[None], scores[None], torch.ones(1, len(boxes)) > 0, threshold, len(boxes))
    assert kept.indices.tolist() == [operators[f"nms_keep_{threshold}"].tolist()]


def test_nms_by_groups(operators):
    boxes, scores = tensor(operators, "nms_boxes")[None], tensor(operators, "nms_scores")[None]
    every = torch.ones_like(scores, dtype=torch.bool)
    moved = moved_apart(boxes, tensor(operators, "nms_ids"), every)
    kept = nms(moved, scores, every, 0.5, scores.shape[1])
    assert kept.indices.tolist() == [operators["batched_nms_keep_0.5"].tolist()]


def test_one_region_may_count_as_several_classes(operators):
    """The golden case keeps 30 of its detections; they are the first of ours."""
    boxes, scores = tensor(operators, "mc_boxes"), tensor(operators, "mc_scores")[:, :-1]
    label = torch.arange(4).expand(60, -1)
    entries = boxes.flatten(0, 1), scores.flatten(), label.flatten()
    (found,) = select(*(part.unsqueeze(0) for part in entries)).of_images()
    best = slice(len(operators["mc_labels"]))
    assert found.labels[best].tolist() == operators["mc_labels"].tolist()
    assert_close(found.boxes[best], operators["mc_dets"][:, :4])
    assert_close(found.scores[best], operators["mc_dets"][:, 4])


@pytest.mark.parametrize("bins", [7, 14])
def test_features_of_regions(operators, bins):
    levels = [tensor(operators, f"roi_feat_{level}").permute(0, 2, 3, 1) for level in range(4)]
    boxes = tensor(operators, "roi_boxes")
    assert level_of(boxes).tolist() == operators["roi_levels"].tolist()
    pooled = pooled_features(levels, boxes[None], bins)[0]
    assert_close(pooled.permute(0, 3, 1, 2), operators[f"roi_out_{bins}"])


def test_masks_are_pasted(operators):
    height, width = operators["paste_hw"].tolist()
    boxes, masks = tensor(operators, "paste_boxes"), tensor(operators, "paste_prob")
    real = (boxes[:, 2:] > boxes[:, :2]).all(-1).tolist()
    assert real.count(False) == 1
    pixels = paste_whole(masks, boxes, (height, width))
    for index, mask in enumerate(paste(masks, boxes, (height, width))):
        assert not np.isnan(mask.probabilities).any()
        if not real[index]:
            continue
        whole = np.zeros((height, width), np.float32)
        h, w = mask.probabilities.shape
        whole[mask.top : mask.top + h, mask.left : mask.left + w] = mask.probabilities
        expected = operators["paste_out_prob"][index]
        assert_close(whole, expected)
        undecided = np.abs(expected - THRESHOLD) < TOLERANCE
        assert ((pixels[index] == operators["paste_out_mask"][index]) | undecided).all()


@pytest.mark.parametrize("name", ["up", "down", "mixed"])
def test_pictures_are_resized_to_the_bit(operators, name):
    expected = operators[f"resize_{name}"]
    assert (resize_bilinear(operators["resize_in"], expected.shape[:2]) == expected).all()


def test_sizes_of_resized_pictures(operators):
    for size, expected in zip(
        operators["rescale_in_hw"].tolist(), operators["rescale_out_hw"].tolist(), strict=True
    ):
        assert list(Resizing(tuple(size)).resized) == expected


def attention_weights(operators, name, config, kind):
    """The weights of a golden attention, folded as those of a block."""
    prefix = "stages.0.attns.0."
    rules = [
        rule
        for rule in block_rules(config, 0, 0, kind)
        if all(source.startswith(prefix) for source in rule.sources)
    ]
    state = {
        source: tensor(operators, f"{name}_{source.removeprefix(prefix)}")
        for rule in rules
        for source in rule.sources
    }
    folded = apply(rules, state)
    target = "stages.0.blocks.0.attention."
    return {key.removeprefix(target): value.float() for key, value in folded.items()}


@pytest.mark.parametrize("name", ["na", "na_small"])
def test_neighbourhood_attention(operators, name):
    given = tensor(operators, f"{name}_in")
    _, C, H, W = given.shape
    config = DatConfig(
        "one", "dat_pp", (StageConfig("N", C, 2),), image_size=(4 * max(H, 9), 4 * W)
    )
    attention = NeighborhoodAttention(config, 0)
    attention.fit((H, W))
    attention.load_state_dict(attention_weights(operators, name, config, "N"))
    with torch.inference_mode():
        tokens = given.permute(0, 2, 3, 1)
        ours = attention.eval()(tokens, torch.zeros_like(tokens)).stream.sum()
    assert_close(ours.permute(0, 3, 1, 2), operators[f"{name}_out"])


@pytest.mark.parametrize("name", ["da", "da_s1"])
def test_deformable_attention(operators, name):
    meta = json.loads(str(operators["meta"]))["da"]
    given = tensor(operators, f"{name}_in")
    _, C, H, W = given.shape
    spec = StageConfig("D", C, meta["heads"], meta["groups"], *meta[name].values())
    side = 4 * (meta["table_side"] + 1) // 2
    config = DatConfig("one", "dat_pp", (spec,), (side, side), side)
    attention = DeformableAttentionPP(config, 0)
    attention.fit((H, W))
    attention.load_state_dict(attention_weights(operators, name, config, "D"))
    with torch.inference_mode():
        tokens = given.permute(0, 2, 3, 1)
        stream, locations, _ = attention.eval()(tokens, torch.zeros_like(tokens))
    assert_close(stream.sum().permute(0, 3, 1, 2), operators[f"{name}_out"])
    assert_close(locations[0], operators[f"{name}_points"])
