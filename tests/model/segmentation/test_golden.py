"""Our segmenters against the official stack, on its golden cases.

`pytest tests/model/segmentation --segmentation-golden-dir DIR` runs any folder of the same format.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike, NDArray

from model.normalise import Normalise
from model.segmentation import Segmentation, segment
from model.segmentation.labelling import Pass, full_logits, label_pixels
from model.segmentation.segmenter import ExplainedLogits
from model.segmentation.transforms import to_model_pixels
from model.segmentation.upernet import UperNetHead
from tests import recipe
from tests.model.segmentation.conftest import (
    Case,
    Recorder,
    auxiliary_state,
    read_case,
    recorded_layers,
)

# As recommended by those who measured how far noise of 1e-5 on the input moves the results.
INPUT, POINTS, PROBABILITY = 1e-5, 2e-5, 2e-4
MAP_VALUES, FULL_LOGITS = 2e-4, 3e-4  # of the standard deviation
DIFFERENT_PIXELS = 5e-4
# The official margin from which on no pixel may differ: of logits 0.0101, of mean probabilities
# 0.00049.
CLEAR, CLEAR_MEAN = 75, 40


class Outputs(NamedTuple):
    """What a case gives.

    Attributes:
        images: the input.
        features: what the backbone returns.
        explained: logits and points.
        layers: what single layers of the head returned.
        modules: what its parts returned, by name.
        segmentation: at the size of the picture.
    """

    images: torch.Tensor
    features: Any
    explained: ExplainedLogits
    layers: Recorder
    modules: dict[str, Any]
    segmentation: Segmentation


@pytest.fixture(scope="module")
def case(segmentation_golden_file: Path) -> Case:
    return read_case(segmentation_golden_file)


@pytest.fixture(scope="module")
def outputs(case: Case) -> Outputs:
    segmenter, head = case.segmenter, case.segmenter.decode_head
    resizing = segmenter.config.resizing(case.pixels.shape[:2])
    parts = {
        "backbone": segmenter.backbone_for(resizing.resized),
        "pyramid": getattr(head, "pyramid", None),
        "psp": getattr(head, "pooling", None),
        **{f"scale_{level}": part for level, part in enumerate(getattr(head, "branches", ()))},
    }
    modules: dict[str, Any] = {}
    hooks = [
        part.register_forward_hook(lambda *call, n=name: modules.update({n: call[2]}))
        for name, part in parts.items()
        if part is not None
    ]
    hooks.append(
        head.classes.register_forward_pre_hook(lambda _, given: modules.update(head=given[0]))
    )
    with torch.inference_mode(), recorded_layers() as layers:
        images = Normalise()(torch.from_numpy(to_model_pixels(case.pixels, resizing))[None])
        explained = segmenter.forward_explained(images)
        if isinstance(head, UperNetHead):
            pooled = head.pooling.pooled(modules["backbone"].maps[-1])
            modules.update({f"ppm_{index}": tokens for index, tokens in enumerate(pooled)})
    for hook in hooks:
        hook.remove()
    passes = [Pass(explained.logits[0], resizing.resized)]
    labelled = label_pixels(passes, case.pixels.shape[:2], confidence=True)
    return Outputs(images, modules["backbone"], explained, layers, modules, labelled)


@pytest.mark.slow
def test_the_recipe_gives_the_weights_and_the_picture_of_the_case(case):
    state = dict(case.state)
    if case.segmenter.config.kind == "upernet":
        state |= auxiliary_state(case.segmenter.config, case.meta["seed"])
    assert recipe.digest(state) == case.meta["weights_sha256"]
    assert hashlib.sha256(case.pixels.tobytes()).hexdigest() == case.meta["image"]["sha256"]


def test_the_resized_picture_is_the_official_one_to_the_bit(case):
    golden = case.golden
    resizing = case.segmenter.config.resizing(case.pixels.shape[:2])
    assert resizing.resized == tuple(golden["img_shape"])[:2]
    pixels = to_model_pixels(case.pixels, resizing)
    assert (pixels == golden["resized_rgb"]).all()
    assert pixels.transpose(2, 0, 1).shape == tuple(golden["input_shape"])
    assert (np.float32(resizing.scale_xy * 2) == golden["scale_factor"]).all()


def test_the_input_matches(case, outputs):
    samples = outputs.images[0].numpy().ravel()[case.golden["input_index"]]
    assert np.abs(samples - case.golden["input_value"]).max() < INPUT


def test_maps_match(case, outputs):
    for level, tokens in enumerate(outputs.features.maps):
        assert_samples(case.golden, f"backbone_{level}", channels_first(tokens))
    assert_samples(case.golden, "head", channels_first(outputs.modules["head"]))
    assert_samples(case.golden, "logits", channels_first(outputs.explained.logits))


def test_the_parts_of_the_head_match(case, outputs):
    golden, head, modules = case.golden, case.segmenter.decode_head, outputs.modules
    parts = ("scale_", "ppm_", "psp")
    seen = {name: part for name, part in modules.items() if name.startswith(parts)}
    seen |= {f"neck_{level}": part for level, part in enumerate(modules.get("pyramid", ()))}
    for golden_name, name in (("lateral", "laterals"), ("fpn", "outputs")):
        for level, layer in enumerate(getattr(head, name, ())):
            seen[f"{golden_name}_{level}"] = outputs.layers.of(layer)
    prefixes = ("neck_", "scale_", "ppm_", "psp_", "lateral_", "fpn_")
    stored = {
        name.removesuffix("_shape")
        for name in golden.files
        if name.startswith(prefixes) and name.endswith("_shape")
    }
    assert stored == seen.keys()
    for name, tokens in seen.items():
        assert_samples(golden, name, channels_first(tokens))


def channels_first(tokens: torch.Tensor) -> NDArray[np.float64]:
    """`(C, H, W)` of the one map `(1, H, W, C)`."""
    return tokens[0].permute(2, 0, 1).double().numpy()


def assert_samples(
    golden: Any, name: str, values: NDArray[np.float64], tolerance: float = MAP_VALUES
) -> None:
    assert values.shape == tuple(golden[f"{name}_shape"]), name
    mean, std = golden[f"{name}_mean_std"]
    assert abs(values.mean() - mean) < tolerance * std, name
    assert abs(values.std() - std) < tolerance * std, name
    samples = values.ravel()[golden[f"{name}_index"]]
    assert np.abs(samples - golden[f"{name}_value"]).max() < tolerance * std, name


def test_sampling_locations_match(case, outputs):
    layers = case.segmenter.deformable_layers
    for layer, locations in zip(layers, outputs.explained.sampling_locations, strict=True):
        expected = case.golden[f"points_s{layer.stage}_b{layer.block:02}"]
        assert np.abs(locations[0].numpy() - expected).max() < POINTS


def test_logits_and_probabilities_of_pixels_match(case, outputs):
    size = case.pixels.shape[:2]
    input_size = case.segmenter.config.resizing(size).resized
    logits = full_logits(Pass(outputs.explained.logits[0], input_size), size)
    values = logits.permute(2, 0, 1).double().numpy()
    assert_samples(case.golden, "full_logits", values, FULL_LOGITS)
    probabilities = logits.softmax(-1).permute(2, 0, 1).numpy()
    assert probabilities.shape == tuple(case.golden["probability_shape"])
    samples = probabilities.ravel()[case.golden["probability_index"]]
    assert np.abs(samples - case.golden["probability_value"]).max() < PROBABILITY
    np.testing.assert_allclose(outputs.segmentation.probabilities, probabilities.max(0), atol=1e-5)


def test_labels_match(case, outputs):
    golden, (labels, probabilities, _) = case.golden, outputs.segmentation
    assert_same_labels(golden, labels)
    codes = (probabilities * 255).round().int().numpy()
    assert np.abs(codes - golden["confidence_code"].astype(int)).max() <= 1
    pixels = np.bincount(labels.flatten(), minlength=len(golden["class_pixels"]))
    assert np.abs(pixels - golden["class_pixels"]).sum() <= 2 * DIFFERENT_PIXELS * labels.numel()


@pytest.mark.slow
def test_a_picture_is_segmented_in_one_call(case, outputs):
    ours = segment(case.segmenter, case.pixels)
    assert ours.probabilities is ours.margins is None
    assert torch.equal(ours.labels, outputs.segmentation.labels)


def assert_same_labels(golden: Any, labels: ArrayLike, kind: str = "") -> None:
    """The same labels but for a few pixels, none of them with a clear margin."""
    expected, code = golden[f"{kind}labels"], golden[f"{kind}margin_code"]
    labels = np.asarray(labels)
    assert labels.shape == expected.shape
    wrong = labels != expected
    assert wrong.mean() <= DIFFERENT_PIXELS
    assert not wrong[code >= (CLEAR_MEAN if kind == "aug_" else CLEAR)].any()


@pytest.mark.slow
def test_labels_at_several_scales_match(case):
    if "aug_labels" not in case.golden:
        pytest.skip("stored for some cases")
    golden, aug = case.golden, case.meta["aug"]
    config, size = case.segmenter.config, case.pixels.shape[:2]
    resizings = [config.resizing(size, ratio) for ratio in aug["img_ratios"]]
    scales = [[resizing.long_side, resizing.short_side] for resizing in resizings]
    assert scales == aug["scales"]
    inputs = [list(resizing.resized) for resizing in resizings for _ in range(2)]
    assert inputs == golden["aug_input_hw"].tolist()
    ours = segment(
        case.segmenter,
        case.pixels,
        ratios=aug["img_ratios"],
        mirrored=aug["flip"],
        confidence=True,
    )
    assert_same_labels(golden, ours.labels, "aug_")
    # Of the samples, those of the class that a pixel was given.
    classes, height, width = golden["aug_probability_shape"]
    of_class, pixel = np.divmod(golden["aug_probability_index"], height * width)
    own = ours.labels.flatten().numpy()[pixel] == of_class
    assert ours.labels.max() < classes
    found = ours.probabilities.flatten().numpy()[pixel[own]]
    assert np.abs(found - golden["aug_probability_value"][own]).max(initial=0) < PROBABILITY
