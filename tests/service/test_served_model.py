import json

import pytest
import torch
from safetensors.torch import save_file

from model import create_model
from model.checkpoint import CheckpointError
from service.served_model import load
from service.settings import Model
from tests.conftest import official_state

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


def test_the_demo_model_needs_no_settings():
    served = load(Model())
    assert served.name == "dat_nano"
    assert len(served.labels) == served.network.config.num_classes >= 10


def test_an_official_checkpoint_with_own_labels(checkpoint, labels):
    served = load(Model(name="dat_nano", checkpoint=checkpoint, labels=labels, version="7"))
    assert list(served.labels) == NAMES
    assert served.version == "7"


def test_labels_may_be_objects_with_names(checkpoint, labels):
    labels.write_text(json.dumps([{"name": name} for name in NAMES]))
    assert load(Model(checkpoint=checkpoint, labels=labels)).labels == tuple(NAMES)


def test_a_thousand_classes_are_those_of_imagenet(tiny_checkpoint):
    labels = load(Model(name="dat_tiny_224", checkpoint=tiny_checkpoint)).labels
    assert len(labels) == 1000
    assert labels[0] == "tench, Tinca tinca"
    assert labels[999].startswith("toilet tissue")


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
    save_file(model.state_dict(), path, metadata={"labels": json.dumps(NAMES)})
    assert load(Model(checkpoint=path)).labels == tuple(NAMES)


def test_names_that_do_not_fit_the_classes_are_refused(checkpoint, labels):
    with pytest.raises(CheckpointError, match=r"DAT_MODEL__LABELS"):
        load(Model(checkpoint=checkpoint))
    labels.write_text(json.dumps(NAMES[:-1]))
    with pytest.raises(CheckpointError, match=r"labels\.json names 11 classes; the model has 12"):
        load(Model(checkpoint=checkpoint, labels=labels))


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "[1, 2]", "3"])
def test_a_damaged_label_file_is_refused(checkpoint, labels, content):
    labels.write_text(content)
    with pytest.raises(CheckpointError, match=r"labels\.json"):
        load(Model(checkpoint=checkpoint, labels=labels))


def test_weights_of_another_variant_are_refused_with_file_and_key(tiny_checkpoint, labels):
    with pytest.raises(CheckpointError, match=r"dat_tiny_in1k_224\.pth.*dat_nano"):
        load(Model(name="dat_nano", checkpoint=tiny_checkpoint, labels=labels))


def test_weights_that_are_no_numbers_are_refused(checkpoint, labels):
    state = official_state("dat_nano")
    state["stages.2.attns.1.proj_q.weight"][0, 0] = float("nan")
    torch.save({"model": state}, checkpoint)
    with pytest.raises(CheckpointError, match=r"not a number in stages\.2\.blocks\.1"):
        load(Model(checkpoint=checkpoint, labels=labels))
