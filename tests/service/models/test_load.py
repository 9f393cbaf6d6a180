import json

import pytest
import torch

from model import create_model
from model.checkpoint import CheckpointError, sha256, write
from model.detection import DETECTORS
from service.computed_tasks import TASKS
from service.models import load as loading
from service.models.card import Label
from service.settings.model import Model
from tests.conftest import official_state
from tests.model.detection.conftest import detector_state

NAMES = [f"class {n}" for n in range(12)]


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": official_state("dat_nano")}, path)
    return path


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(NAMES))
    return path


def load(chosen):
    return loading.load(chosen, [task.loader for task in TASKS])


def names(served):
    return [label.name for label in served.labels]


def test_the_demo_model_needs_no_settings():
    served = load(Model())
    assert served.name == "dat_nano"
    assert len(served.labels) == served.network.config.num_classes >= 10


def test_an_official_checkpoint_with_own_labels(checkpoint, labels):
    served = load(Model(name="dat_nano", checkpoint=checkpoint, labels=labels, version="7"))
    assert names(served) == NAMES
    assert served.version == "7"


def test_labels_may_be_objects_or_lines(checkpoint, labels, tmp_path):
    labels.write_text(json.dumps([{"name": name} for name in NAMES]))
    assert names(load(Model(checkpoint=checkpoint, labels=labels))) == NAMES
    lines = tmp_path / "labels.txt"
    lines.write_text("\n".join(NAMES) + "\n")
    assert names(load(Model(checkpoint=checkpoint, labels=lines))) == NAMES


def test_a_thousand_classes_are_those_of_imagenet(tiny_checkpoint):
    labels = load(Model(checkpoint=tiny_checkpoint)).labels
    assert len(labels) == 1000
    assert (labels[0].name, labels[0].wnid) == ("tench, Tinca tinca", "n01440764")
    assert labels[999].name.startswith("toilet tissue")
    assert [label.wnid for label in labels] == sorted(label.wnid for label in labels)


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({}, "dat_tiny_224"),
        ({"name": "mine"}, "mine"),
        ({"variant": "dat_tiny_224"}, "dat_tiny_224"),
    ],
)
def test_a_model_is_called_what_the_settings_say_or_by_its_variant(tiny_checkpoint, chosen, name):
    served = load(Model(checkpoint=tiny_checkpoint, **chosen))
    assert (served.name, served.network.config.name) == (name, "dat_tiny_224")


def test_parameters_and_flops_are_those_of_the_paper(tiny_checkpoint):
    cost = load(Model(checkpoint=tiny_checkpoint))
    assert (round(cost.parameters / 1e6, 1), round(cost.flops / 1e9, 1)) == (28.3, 4.6)


def test_the_sha256_of_the_file_can_be_required(tiny_checkpoint):
    found = sha256(tiny_checkpoint)
    load(Model(checkpoint=tiny_checkpoint, sha256=found.upper()))
    with pytest.raises(CheckpointError, match=f"pth: has the SHA-256 {found}, expected 0{{64}}"):
        load(Model(checkpoint=tiny_checkpoint, sha256="0" * 64))
    with pytest.raises(CheckpointError, match="no such file"):
        load(Model(checkpoint="/nowhere.pth", sha256=found))


@pytest.mark.parametrize("size", [(64, 96), 160])
def test_another_input_size(size):
    served = load(Model(image_size=size))
    assert served.network.config.image_size == (size if isinstance(size, tuple) else (size, size))


def test_an_input_size_that_the_model_cannot_take_is_refused(tiny_checkpoint):
    with pytest.raises(CheckpointError, match=r"at least 33 pixels a side; got 20x20"):
        load(Model(image_size=20))
    with pytest.raises(CheckpointError, match=r"pth: dat_tiny_224: a DAT \(v1\) input is square"):
        load(Model(checkpoint=tiny_checkpoint, image_size=(224, 448)))


@pytest.mark.parametrize("setting", [{"resize_mode": "letterbox"}, {"letterbox_size": 256}])
def test_the_resizing_of_detectors_is_refused_for_classifiers(setting):
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))}.* for detectors"):
        load(Model(**setting))


def test_the_head_of_a_fine_tuned_checkpoint_decides_the_classes(tmp_path):
    state = official_state("dat_nano", num_classes=3)
    path, labels = tmp_path / "three.pth", tmp_path / "three.json"
    torch.save(state, path)
    labels.write_text('["a", "b", "c"]')
    served = load(Model(checkpoint=path, labels=labels))
    assert served.network.config.num_classes == 3


def test_own_files_keep_their_labels(tmp_path):
    model = create_model("dat_nano")
    model.load_state_dict(official_state("dat_nano"))
    path = tmp_path / "own.safetensors"
    write(path, model.state_dict(), {"variant": "dat_nano", "labels": json.dumps(NAMES)})
    assert load(Model(checkpoint=path)).labels == tuple(map(Label, NAMES))


def test_names_that_do_not_fit_the_classes_are_refused(checkpoint, labels):
    with pytest.raises(CheckpointError, match=r"DAT_MODEL__LABELS"):
        load(Model(checkpoint=checkpoint))
    labels.write_text(json.dumps(NAMES[:-1]))
    with pytest.raises(CheckpointError, match=r"labels\.json: names 11 classes, expected the 12"):
        load(Model(checkpoint=checkpoint, labels=labels))


@pytest.mark.parametrize(
    "content", ["", "{", '{"a": 1}', "[1, 2]", "3", '"abc"', '[{"wnid": "n1"}]']
)
def test_a_damaged_label_file_is_refused(checkpoint, labels, content):
    labels.write_text(content)
    with pytest.raises(CheckpointError, match=r"labels\.json"):
        load(Model(checkpoint=checkpoint, labels=labels))


def test_label_lines_without_a_name_are_refused(checkpoint, tmp_path):
    lines = tmp_path / "labels.txt"
    lines.write_text("a\n\nb\n")
    with pytest.raises(CheckpointError, match=r"labels\.txt: line 2 is empty"):
        load(Model(checkpoint=checkpoint, labels=lines))


MARK = "\ufeff"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", MARK + "\r\n".join(NAMES)),
        ("labels.json", MARK + json.dumps(NAMES)),
        ("labels.json", json.dumps([MARK + NAMES[0], *NAMES[1:]])),
        ("labels.json", MARK + json.dumps([{"name": name} for name in NAMES])),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_label(checkpoint, tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, "utf-8")
    assert names(load(Model(checkpoint=checkpoint, labels=path))) == NAMES


@pytest.mark.parametrize(
    "stored", [MARK + json.dumps(NAMES), json.dumps([MARK + "class 0", *NAMES[1:]])]
)
def test_a_byte_order_mark_is_no_part_of_a_stored_label(tmp_path, stored):
    model = create_model("dat_nano")
    path = tmp_path / "own.safetensors"
    write(path, model.state_dict(), {"variant": "dat_nano", "labels": stored})
    assert names(load(Model(checkpoint=path))) == NAMES


def test_a_byte_order_mark_is_no_part_of_a_label_of_a_detector(tmp_path):
    config = DETECTORS["mask_rcnn_dat_nano"]
    path = tmp_path / "detector.pth"
    classes = [MARK + NAMES[0], *NAMES[1:]]
    torch.save({"meta": {"CLASSES": classes}, "state_dict": detector_state(config)}, path)
    assert names(load(Model(checkpoint=path))) == NAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n".join(NAMES).encode("utf-16"), "the text is in UTF-16, save it as UTF-8"),
        ("\n".join(NAMES).encode("utf-32"), "the text is in UTF-32"),
        ("\n".join(NAMES).encode("utf-16-le"), "zero bytes, as text in UTF-16"),
        ("crêpe\ncafé".encode("latin-1"), r"line 1 is not in UTF-8 \(byte 0xea\)"),
    ],
)
@pytest.mark.parametrize("name", ["labels.txt", "labels.json"])
def test_labels_in_another_encoding_are_refused_by_its_name(
    checkpoint, tmp_path, name, content, message
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: not a readable label file: .*{message}"):
        load(Model(checkpoint=checkpoint, labels=path))


def test_the_moving_average_of_the_weights_is_served_by_a_setting(tmp_path, labels):
    state = official_state("dat_nano")
    averages = official_state("dat_nano", seed=1)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": state, "state_dict_ema": averages}, path)
    for weights, expected in (("model", state), ("ema", averages)):
        network = load(Model(checkpoint=path, labels=labels, weights=weights)).network
        torch.testing.assert_close(network.head.bias.data, expected["cls_head.bias"])


def test_weights_of_another_variant_are_refused_with_file_and_key(tiny_checkpoint, labels):
    with pytest.raises(CheckpointError, match=r"dat_tiny_in1k_224\.pth.*dat_nano"):
        load(Model(name="dat_nano", checkpoint=tiny_checkpoint, labels=labels))


def test_weights_that_are_no_numbers_are_refused(checkpoint, labels):
    state = official_state("dat_nano")
    state["stages.2.attns.1.proj_q.weight"][0, 0] = float("nan")
    torch.save({"model": state}, checkpoint)
    with pytest.raises(CheckpointError, match=r"weights\.pth.*stages\.2\.attns\.1\.proj_q\.weight"):
        load(Model(checkpoint=checkpoint, labels=labels))
