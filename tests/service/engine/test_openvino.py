import json
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import DAT, VARIANTS, DatConfig, create_model
from model.transforms import Preprocessing, to_model_pixels
from service.engine import openvino
from service.engine.classify import Classify, Ranked
from service.engine.device import DeviceUnavailable
from service.engine.openvino import OpenVinoClassify, check_available
from tests import recipe
from tests.conftest import GOLDEN, SMALL_DAT, official_state, recipe_state

pytestmark = pytest.mark.slow

needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="the extra openvino is not installed"
)


# OpenVINO does not compile windows with a single head, which no published variant has.
SMALL_DAT_TWO_HEADS = replace(
    SMALL_DAT,
    stages=tuple(replace(stage, heads=max(2, stage.heads)) for stage in SMALL_DAT.stages),
)


def classifier(config: DatConfig, seed: int = 0) -> Classify:
    """Random weights; the classes 3 and 7 have the same."""
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config, seed))
    for parameter in model.head.parameters():
        parameter.data[7] = parameter.data[3]
    return Classify(model, torch.float32).eval()


def opened(
    classify: Classify,
    cache: Path | None,
    *,
    threads: int = 1,
    dtype: torch.dtype = torch.float32,
) -> OpenVinoClassify:
    size = classify.model.config.image_size
    return OpenVinoClassify(classify, size, (1, 8), threads, cache, dtype=dtype)


@pytest.fixture(scope="module")
def nano() -> Classify:
    return classifier(VARIANTS["dat_nano"])


@pytest.fixture(scope="module")
def cache(nano, tmp_path_factory) -> Path:
    """With the export of `nano`."""
    folder: Path = tmp_path_factory.mktemp("cache")
    opened(nano, folder)
    return folder


@needs_openvino
@pytest.mark.parametrize(
    "config", [VARIANTS["dat_nano"], SMALL_DAT_TWO_HEADS], ids=lambda config: config.name
)
def test_every_batch_agrees_with_torch(config, cache):
    classify = classifier(config)
    compiled = opened(classify, cache, threads=2)
    images = [recipe.image(0, index, *config.image_size) for index in range(7)]
    pixels = torch.from_numpy(np.stack(images))
    for size in (7, 1, 2):
        ours = compiled(pixels[:size])
        with torch.inference_mode():
            expected = classify(pixels[:size])
        torch.testing.assert_close(by_class(ours), by_class(expected), rtol=0, atol=1e-6)
        assert (ours.scores.diff() <= 0).all()
        assert ours.classes.dtype == torch.int32
        # Of equal scores the lower class is first.
        places = ours.classes.long().argsort(1)
        assert (places[:, 7] == places[:, 3] + 1).all()
        for points, theirs in zip(
            ours.sampling_locations, expected.sampling_locations, strict=True
        ):
            torch.testing.assert_close(points, theirs, rtol=0, atol=1e-5)


@needs_openvino
def test_bfloat16_is_rounded_as_in_torch_or_refused(nano, cache):
    size = nano.model.config.image_size
    pixels = torch.from_numpy(np.stack([recipe.image(0, index, *size) for index in range(3)]))
    if "bf16" not in Path("/proc/cpuinfo").read_text("ascii"):
        with pytest.raises(DeviceUnavailable, match=r"DAT_ENGINE__DTYPE.* set it to float32"):
            opened(nano, cache, dtype=torch.bfloat16)
        return
    ours = opened(nano, cache, dtype=torch.bfloat16)(pixels)
    rounded = Classify(deepcopy(nano.model), torch.bfloat16).eval()
    with torch.inference_mode():
        exact, torchs = nano(pixels), rounded(pixels)

    def errors(ranked: Ranked) -> list[float]:
        numbers = zip((by_class(ranked), *ranked.sampling_locations), expected, strict=True)
        return [(ours - theirs).abs().max().item() for ours, theirs in numbers]

    expected = by_class(exact), *exact.sampling_locations
    for error, of_torch in zip(errors(ours), errors(torchs), strict=True):
        assert 1e-5 < error < 3 * of_torch


def by_class(ranked: Ranked) -> torch.Tensor:
    return ranked.scores.gather(1, ranked.classes.long().argsort(1))


@pytest.mark.slow
@needs_openvino
def test_a_golden_picture_is_classified_as_officially():
    golden = np.load(GOLDEN / "dat_tiny_224.npz")
    meta = json.loads(str(golden["meta"]))
    model = create_model("dat_tiny_224")
    model.load_state_dict(official_state("dat_tiny_224", meta["weight_seed"]))
    picture = recipe.image(meta["input_seed"], meta["e2e"]["image_index"], *meta["e2e"]["image_hw"])
    pixels = to_model_pixels(Image.fromarray(picture), Preprocessing.of(model.config))
    compiled = opened(Classify(model, torch.float32).eval(), None)
    scores, classes, *_ = compiled(torch.from_numpy(pixels)[None])
    assert classes[0, :5].tolist() == golden["e2e_top5"].tolist()
    assert np.abs(scores[0, :5].numpy() - golden["e2e_top5_prob"]).max() < 1e-6


@needs_openvino
def test_an_export_is_kept_for_its_weights(nano, cache, monkeypatch):
    assert {path.suffix for path in cache.glob("openvino/*")} == {".bin", ".xml"}

    def refuse(*args: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(openvino, "_export", refuse)
    opened(nano, cache)
    with pytest.raises(NotImplementedError):
        opened(classifier(VARIANTS["dat_nano"], seed=1), cache)


@needs_openvino
def test_a_model_that_computes_something_else_is_refused(nano, cache, monkeypatch):
    key = openvino._key(nano, nano.model.config.image_size)
    monkeypatch.setattr(openvino, "_key", lambda *args: key)
    with pytest.raises(RuntimeError, match="differ"):
        opened(classifier(VARIANTS["dat_nano"], seed=1), cache)


@needs_openvino
def test_nothing_is_reported_to_the_maker(nano, cache):
    opened(nano, cache)
    assert sys.modules["openvino_telemetry"] is None


def test_without_the_extra_the_error_says_what_to_install(nano, monkeypatch):
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(
        DeviceUnavailable, match=r"DAT_ENGINE__BACKEND.* pip install .* '\.\[openvino\]'"
    ):
        opened(nano, None)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.float16)])
def test_it_is_for_float32_and_bfloat16_on_a_cpu(device, dtype):
    with pytest.raises(
        DeviceUnavailable, match="DAT_ENGINE__BACKEND=openvino computes in float32 or bfloat16"
    ):
        check_available(torch.device(device), dtype)
