"""Our detectors against the official stack, on its golden cases.

`pytest tests/model/detection --detector-golden-dir DIR` runs any folder of the same format.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.detection import Detections, Detector, ExplainedDetections, create_detector, roi_heads
from model.detection.dense import LevelOutput
from model.detection.masks import THRESHOLD, paste
from model.detection.normalise import Normalise
from model.detection.official import official_shapes
from model.detection.retinanet import RetinaNetHead
from model.detection.roi_align import pooled_features
from model.detection.rpn import proposals
from model.detection.transforms import Resizing, to_model_pixels
from tests import recipe
from tests.model.detection import recipe as detector_recipe

# As recommended by those who measured how far noise of 1e-5 on the features moves the results.
BOX, SCORE, MASK_PROBABILITY = 0.05, 5e-4, 2e-3
# A pixel may fall on the other side where its probability is this near to the threshold. How many
# do says nothing: some masks have plateaus there.
UNDECIDED = 3e-3
# RoIAlign takes as many samples as the size of a region, divided by bins and rounded up, is. Where
# the quotient is within rounding of a whole number there may be one more on another CPU, and the
# region is refined a little differently; one of a thousand was.
RECOUNTED, RECOUNTED_BOX = 0.005, 0.5
MAP_VALUES = 2e-4  # of the standard deviation of the map
POINTS = 2e-5
KINDS = {"rtn": "retinanet", "mrcn": "mask_rcnn", "cmrcn": "cascade_mask_rcnn"}


@dataclass
class Case:
    golden: Any
    meta: dict[str, Any]
    detector: Detector
    state: dict[str, NDArray[np.float32]]
    pixels: NDArray[np.uint8]
    resizing: Resizing
    images: torch.Tensor
    outputs: ExplainedDetections
    captured: dict[str, list[Any]]

    @property
    def found(self) -> Detections:
        return self.outputs.detections[0]


@pytest.fixture(scope="module")
def case(detector_golden_file: Path) -> Case:
    golden = np.load(detector_golden_file)
    meta = json.loads(str(golden["meta"]))
    kind, size = meta["variant"].split("_")
    detector = create_detector(f"{KINDS[kind]}_dat_pp_{size}")
    state = {
        key: detector_recipe.tensor(key, shape, meta["seed"], meta["overrides"], golden)
        for key, shape in official_shapes(detector.config).items()
    }
    detector.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    picture = meta["image"]
    pixels = detector_recipe.picture(picture["seed"], picture["height"], picture["width"])
    resizing = Resizing(pixels.shape[:2], *meta["img_scale"])
    sizes = torch.tensor([resizing.resized])
    captured: dict[str, list[Any]] = {}
    watch(detector, resizing.padded, captured)

    def recorded(levels: Any, regions: torch.Tensor, *others: Any) -> torch.Tensor:
        captured.setdefault("regions", []).append(regions[0])
        return pooled_features(levels, regions, *others)

    def recorded_outputs(head: RetinaNetHead, levels: Any) -> list[LevelOutput]:
        captured["dense outputs"] = outputs(head, levels)
        return captured["dense outputs"]

    outputs = RetinaNetHead.outputs
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(roi_heads, "pooled_features", recorded)
        patch.setattr(RetinaNetHead, "outputs", recorded_outputs)
        images = Normalise()(torch.from_numpy(to_model_pixels(pixels, resizing))[None], sizes)
        explained = detector.forward_explained(images, sizes, torch.tensor([resizing.scale_xy]))
    return Case(golden, meta, detector, state, pixels, resizing, images, explained, captured)


def watch(detector: Detector, size: tuple[int, int], captured: dict[str, list[Any]]) -> None:
    """Keep the outputs of the parts of a detector."""
    parts = {
        "backbone": detector.backbone_for(size),
        "fpn": detector.fpn,
        "candidates": getattr(detector.head, "rpn", None),
    }
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.register_forward_hook(
                lambda *call, n=name: captured.setdefault(n, []).append(call[2])
            )
    for head in getattr(detector.head, "box_heads", ()):
        head.register_forward_hook(
            lambda *call: captured.setdefault("box heads", []).append(call[2])
        )


@pytest.mark.slow
def test_the_recipe_gives_the_weights_and_the_picture_of_the_case(case):
    assert recipe.digest(case.state) == case.meta["weights_sha256"]
    assert hashlib.sha256(case.pixels.tobytes()).hexdigest() == case.meta["image"]["sha256"]


def test_the_resized_picture_is_the_official_one_to_the_bit(case):
    golden = case.golden
    height, width = case.resizing.resized
    assert (height, width) == tuple(golden["img_shape"])
    pixels = to_model_pixels(case.pixels, case.resizing)
    assert (pixels[:height, :width] == golden["resized_rgb"]).all()
    assert pixels.transpose(2, 0, 1).shape == tuple(golden["input_shape"])
    assert (np.float32(case.resizing.scale_xy * 2) == golden["scale_factor"]).all()


def test_the_input_matches(case):
    assert_samples(case.golden, "input_0", case.images)


def test_maps_match(case):
    (features,), (levels,) = case.captured["backbone"], case.captured["fpn"]
    for name, maps in (("backbone", features.maps), ("fpn", levels)):
        assert f"{name}_{len(maps)}_shape" not in case.golden
        for index, tokens in enumerate(maps):
            assert_samples(case.golden, f"{name}_{index}", tokens.permute(0, 3, 1, 2))


def assert_samples(golden: Any, name: str, ours: torch.Tensor) -> None:
    values = ours[0].double().numpy()
    assert values.shape == tuple(golden[f"{name}_shape"])
    mean, std = golden[f"{name}_mean_std"]
    assert abs(values.mean() - mean) < MAP_VALUES * std
    assert abs(values.std() - std) < MAP_VALUES * std
    samples = values.ravel()[golden[f"{name}_index"]]
    assert np.abs(samples - golden[f"{name}_value"]).max() < MAP_VALUES * std


def test_sampling_locations_match(case):
    for layer, locations in zip(
        case.detector.deformable_layers, case.outputs.sampling_locations, strict=True
    ):
        expected = case.golden[f"points_s{layer.stage}_b{layer.block:02}"]
        assert np.abs(locations[0].numpy() - expected).max() < POINTS


def test_dense_outputs_match(case):
    if case.detector.config.kind != "retinanet":
        pytest.skip("RetinaNet alone")
    logits, deltas = zip(*case.captured["dense outputs"], strict=True)
    for outputs, name in ((logits, "cls_logits"), (deltas, "reg")):
        for output, (mean, std) in zip(outputs, case.golden[f"{name}_mean_std"], strict=True):
            assert abs(output.double().mean() - mean) < MAP_VALUES * std
            assert abs(output.double().std() - std) < MAP_VALUES * std


def test_proposals_and_refined_regions_match(case):
    if case.detector.config.kind == "retinanet":
        pytest.skip("two stages alone")
    (candidates,) = case.captured["candidates"]
    (found,) = proposals(candidates).boxes
    assert_same_boxes(found, case.golden["proposals"][:, :4])
    assert_same_boxes(found[:50], case.golden["proposals"][:50, :4])
    logits = torch.stack([logits for logits, _ in case.captured["box heads"]]).mean(0)
    expected = case.golden["roi_cls_logits_mean"]
    assert np.abs(logits.double().mean(0).numpy() - expected).max() < 1e-3
    if case.detector.config.kind == "cascade_mask_rcnn":
        _, *refined, _ = case.captured["regions"]  # then those of masks
        for regions, expected in zip(refined, ("rois_stage1", "rois_stage2"), strict=True):
            assert_same_boxes(regions, case.golden[expected], RECOUNTED)


def assert_same_boxes(
    ours: torch.Tensor, expected: NDArray[np.float32], recounted: float = 0.0
) -> None:
    """Equal up to the tolerance and to the order of scores that rounding decides."""
    assert tuple(ours.shape) == expected.shape
    distance = np.abs(ours.numpy()[:, None] - expected[None]).max(-1)
    for nearest in (distance.min(0), distance.min(1)):
        assert (nearest >= BOX).mean() <= recounted
        assert nearest.max() < RECOUNTED_BOX


def test_detections_match(case):
    golden, found = case.golden, case.found
    assert (found.scores.diff() <= 0).all()
    assert len(found.boxes) == len(golden["boxes"])
    for ours, theirs in pairs(case):
        assert found.labels[ours] == golden["labels"][theirs]
        assert np.abs(found.boxes[ours].numpy() - golden["boxes"][theirs]).max() < BOX
        assert abs(found.scores[ours].item() - golden["scores"][theirs]) < SCORE


def pairs(case: Case) -> list[tuple[int, int]]:
    """Our detections and the official ones, nearest boxes of a class first, one to one."""
    golden, found = case.golden, case.found
    distance = np.abs(found.boxes.numpy()[:, None] - golden["boxes"][None]).max(-1)
    distance[found.labels.numpy()[:, None] != golden["labels"][None]] = np.inf
    matched: list[tuple[int, int]] = []
    for _ in range(len(distance)):
        ours, theirs = np.unravel_index(distance.argmin(), distance.shape)
        matched.append((int(ours), int(theirs)))
        distance[ours] = distance[:, theirs] = np.inf
    return matched


def test_masks_match(case):
    golden, found = case.golden, case.found
    if case.detector.config.kind == "retinanet":
        assert found.mask_probabilities is None
        return
    count, height, width = golden["mask_shape"]
    packed = np.unpackbits(golden["mask_packed"], axis=1, count=height * width)
    expected = packed.reshape(count, height, width).astype(bool)
    pasted = list(paste(found.mask_probabilities, found.boxes, (height, width)))
    for ours, theirs in pairs(case):
        probability = found.mask_probabilities[ours].numpy()
        stored = golden["mask_probability"][theirs].astype(np.float32)
        assert np.abs(probability - stored).max() < MASK_PROBABILITY
        whole = np.zeros((height, width), np.float32)
        top, left, part = pasted[ours].top, pasted[ours].left, pasted[ours].probabilities
        whole[top : top + part.shape[0], left : left + part.shape[1]] = part
        different = (whole >= THRESHOLD) != expected[theirs]
        assert (np.abs(whole[different] - THRESHOLD) < UNDECIDED).all()
