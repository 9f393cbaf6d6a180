import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from model import load_model
from model.checkpoint import CheckpointError, sha256
from model.detection import DETECTORS, load_detector
from service.computed_tasks import TASKS
from service.models import convert as converting
from service.models import load as loading
from service.settings.model import Model, ModelChoice
from tests import detection_clients
from tests.clients import JPEG, over_http
from tests.conftest import official_state
from tests.model.detection.conftest import detector_state
from tests.server import start_server
from tests.service.commands import run, run_all

pytestmark = pytest.mark.slow

DETECTOR = DETECTORS["mask_rcnn_dat_nano"]
OBJECTS = tuple(f"object {n}" for n in range(DETECTOR.num_classes))

LOADERS = [task.loader for task in TASKS]


def load(chosen):
    return loading.load(chosen, LOADERS)


def convert(chosen, out):
    return converting.convert(chosen, out, LOADERS)


def save_detector(path, names=None, classes=DETECTOR.num_classes):
    """A detector with recipe weights in the form of the official checkpoints."""
    state = detector_state(replace(DETECTOR, num_classes=classes))
    meta = {"epoch": 36, "config": "…"} | ({"CLASSES": names} if names else {})
    torch.save({"meta": meta, "state_dict": state}, path)


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """An official checkpoint of a detector, and what it was converted to."""
    folder = tmp_path_factory.mktemp("detector")
    official, out = folder / "mrcn_nano.pth", folder / "nano.safetensors"
    save_detector(official, OBJECTS)
    ended = run("convert", "--checkpoint", official, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "mask_rcnn_dat_nano" in ended.stdout
    return official, out


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny.safetensors"
    ended = run("convert", "--checkpoint", tiny_checkpoint, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "dat_tiny_224" in ended.stdout
    return out


def test_a_converted_file_says_what_it_is_and_where_from(converted, tiny_checkpoint):
    with safe_open(converted, framework="pt") as file:
        assert file.metadata() == {
            "variant": "dat_tiny_224",
            "image_size": "[224, 224]",
            "table_size": "224",
            "window": "7",
            "classes": "1000",
            "source": tiny_checkpoint.name,
            "source_sha256": sha256(tiny_checkpoint),
        }


def test_a_converted_file_is_the_same_model(converted, tiny_checkpoint):
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, outputs = (load_model(path)(images) for path in (tiny_checkpoint, converted))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


async def test_a_converted_file_is_served_without_further_settings(converted):
    with start_server(DAT_MODEL__CHECKPOINT=converted) as server:
        answer = await over_http(server, [JPEG])
    assert answer.model == "dat_tiny_224"
    assert len(answer.results[0].predictions) == 5


def test_sizes_and_labels_are_kept(tmp_path):
    names = [f"kind {n}" for n in range(3)]
    weights, labels, out = (tmp_path / name for name in ("w.pth", "l.txt", "o.safetensors"))
    torch.save(official_state("dat_nano", num_classes=3), weights)
    labels.write_text("\n".join(names))
    ended = run(
        "convert", "--checkpoint", weights, "--out", out, "--labels", labels, "--image-size", 96
    )
    assert ended.returncode == 0, ended.stderr
    served = load(Model(checkpoint=out))
    assert [label.name for label in served.labels] == names
    assert served.network.config.image_size == (96, 96)


def test_a_resized_dat_keeps_its_window_and_interpolated_tables(tmp_path, tiny_checkpoint):
    out = tmp_path / "at_384.safetensors"
    ended = run("convert", "--checkpoint", tiny_checkpoint, "--out", out, "--image-size", 384)
    assert ended.returncode == 0, ended.stderr
    own, official = load_model(out), load_model(tiny_checkpoint, image_size=(384, 384))
    assert own.config == official.config
    for name, value in official.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=0)


def test_what_cannot_be_converted_is_refused_and_nothing_written(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(official_state("dat_nano"), weights)
    messages = {
        ("o.pth",): "o.pth: the file to write must end in .safetensors",
        ("missing/o.safetensors",): "o.safetensors: cannot be written",
        ("o.safetensors", "--variant", "dat_tiny_224"): "not a checkpoint of dat_tiny_224",
        ("o.safetensors", "--variant", "resnet"): "no variant 'resnet'",
        ("o.safetensors", "--image-size", "7"): "at least 33 pixels",
        ("o.safetensors", "--labels", __file__): "test_convert.py: line",
    }
    refusals = run_all(
        (("convert", "--checkpoint", weights, "--out", tmp_path / out, *options), {})
        for out, *options in messages
    )
    for ended, message in zip(refusals, messages.values(), strict=True):
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == [weights]


def test_the_classes_of_the_demo_model_survive_a_conversion(tmp_path):
    demo = load(Model())
    out = tmp_path / "demo.safetensors"
    assert run("convert", "--checkpoint", demo.source, "--out", out).returncode == 0
    assert load(Model(checkpoint=out)).labels == demo.labels
    with safe_open(out, framework="pt") as file:
        assert len(json.loads(file.metadata()["labels"])) == 12


def test_a_converted_detector_says_what_it_is_and_where_from(detectors):
    official, out = detectors
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {
            "variant": "mask_rcnn_dat_nano",
            "classes": "12",
            "labels": json.dumps([{"name": name, "wnid": None} for name in OBJECTS]),
            "source": "mrcn_nano.pth",
            "source_sha256": sha256(official),
        }


def test_a_converted_detector_finds_the_same(detectors):
    images = torch.randn(1, 3, 192, 256, generator=torch.Generator().manual_seed(0))
    seen = images, torch.tensor([[180, 250]]), torch.tensor([[1.5, 1.25]])
    with torch.inference_mode():
        (expected,), (found,) = (load_detector(path).detector(*seen) for path in detectors)
    assert len(found.scores) > 10
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0)


async def test_a_converted_detector_is_served_without_further_settings(detectors):
    with start_server(DAT_MODEL__CHECKPOINT=detectors[1]) as server:
        answer = await detection_clients.over_http(server, [JPEG])
    assert answer.model == "mask_rcnn_dat_nano"
    (image,) = answer.images
    assert len(image.found) > 10
    assert all(found.label == OBJECTS[found.index] for found in image.found)


@pytest.mark.parametrize("stored", [None, OBJECTS])
def test_a_label_file_names_what_a_detector_finds(tmp_path, stored):
    weights, labels, out = (tmp_path / name for name in ("w.pth", "l.txt", "o.safetensors"))
    save_detector(weights, stored)
    names = [f"kind {n}" for n in range(DETECTOR.num_classes)]
    labels.write_text("\n".join(names))
    convert(ModelChoice(checkpoint=weights, labels=labels), out)
    assert [label.name for label in load(Model(checkpoint=out)).labels] == names


def test_eighty_objects_are_those_of_coco(tmp_path):
    weights, out = tmp_path / "w.pth", tmp_path / "o.safetensors"
    save_detector(weights, classes=80)
    labels = json.loads(convert(ModelChoice(checkpoint=weights), out)["labels"])
    assert [labels[0]["name"], labels[79]["name"]] == ["person", "toothbrush"]


def test_the_moving_average_of_a_detector_is_converted(tmp_path):
    """As mmcv keeps it, in the file of a distributed and compiled model."""
    weights, out = tmp_path / "w.pth", tmp_path / "ema.safetensors"
    state = detector_state(DETECTOR)
    buffers = {f"ema_{key.replace('.', '_')}": value / 2 for key, value in state.items()}
    wrapped = {f"module._orig_mod.{key}": value for key, value in (state | buffers).items()}
    torch.save({"meta": {"CLASSES": OBJECTS}, "state_dict": wrapped}, weights)
    ended = run("convert", "--checkpoint", weights, "--out", out, "--weights", "ema")
    assert ended.returncode == 0, ended.stderr
    assert '"weights": "ema"' in ended.stdout
    for weights_of in ("model", "ema"):
        bias = (
            load(Model(checkpoint=out, weights=weights_of)).network.head.box_heads[0].classes.bias
        )
        expected = state["roi_head.bbox_head.fc_cls.bias"] / 2
        torch.testing.assert_close(bias.data, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 640}, r"w\.pth: a detector takes every image at a size of its own"),
        ({"variant": "dat_nano"}, "not a checkpoint of dat_nano"),
        ({"variant": "retinanet_dat_pp_tiny"}, "not a checkpoint of retinanet_dat_pp_tiny"),
        ({"labels": __file__}, r"test_convert\.py: line"),
        ({}, r"w\.pth: has 12 classes and no names for them: give a label file"),
    ],
)
def test_a_detector_that_cannot_be_converted_is_refused(tmp_path, options, message):
    weights = tmp_path / "w.pth"
    save_detector(weights)
    with pytest.raises(CheckpointError, match=message):
        convert(ModelChoice(checkpoint=weights, **options), tmp_path / "o.safetensors")
    assert list(tmp_path.iterdir()) == [weights]


def test_the_demo_detector_survives_a_conversion(tmp_path):
    demo = load(Model(name="mask_rcnn_dat_nano"))
    out = tmp_path / "demo.safetensors"
    convert(ModelChoice(checkpoint=demo.source), out)
    converted = load(Model(checkpoint=out))
    assert converted.labels == demo.labels
    state = demo.network.state_dict()
    assert converted.network.state_dict().keys() == state.keys()
    for name, value in converted.network.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
