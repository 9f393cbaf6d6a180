"""A Swin among the models: its file, its names, its conversion."""

import json
import sys
from dataclasses import asdict

import pytest
import torch

from demo.scenes import CLASSES
from model.checkpoint import CheckpointError, read, write
from model.swin import read_swin, swin_shapes
from model.swin_config import SwinConfig
from service.computed_tasks import TASKS
from service.models import load as loading
from service.settings.model import Model
from tests.service.commands import run

SMALL = SwinConfig("swin", 8, (1, 2), (1, 2), window=4, image_size=(32, 32), num_classes=3)


def load(chosen):
    return loading.load(chosen, [task.loader for task in TASKS])


def folder_of(path, classes=3, **config):
    """A checkpoint with a head of so many classes, as transformers keeps it."""
    random = torch.Generator().manual_seed(0)
    shapes = swin_shapes(SMALL) | {
        "classifier.weight": (classes, 16),
        "classifier.bias": (classes,),
    }
    state = {name: torch.randn(shape, generator=random) / 4 for name, shape in shapes.items()}
    write(path / "model.safetensors", state, {})
    stored = {
        "model_type": "swin", "image_size": 32, "embed_dim": 8, "depths": [1, 2],
        "num_heads": [1, 2], "window_size": 4, **config,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(stored))
    return path / "model.safetensors"


def test_the_bundled_swin_needs_its_name_alone():
    served = load(Model(name="swin_nano"))
    assert (served.name, served.config.name, served.task) == ("swin_nano", "swin_nano", "classify")
    assert [label.name for label in served.labels] == list(CLASSES)
    assert served.image_size == (128, 128)
    assert served.config.crop  # it sees what dat_nano sees
    assert served.parameters == sum(p.numel() for p in served.network.parameters())
    assert served.source.stat().st_size < 4 * 2**20


def test_a_checkpoint_of_the_user_has_the_names_of_its_configuration(tmp_path):
    named = {str(n): name for n, name in enumerate(["cat", "dog", "owl"])}
    path = folder_of(tmp_path, id2label=named)
    served = load(Model(checkpoint=path))
    assert (served.name, served.config) == ("swin", SMALL)
    assert [label.name for label in served.labels] == ["cat", "dog", "owl"]
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc")
    served = load(Model(name="mine", checkpoint=path, labels=labels, image_size=(33, 60)))
    assert (served.name, served.image_size) == ("mine", (33, 60))
    assert [label.name for label in served.labels] == ["a", "b", "c"]


def test_a_thousand_classes_without_names_are_those_of_imagenet(tmp_path):
    named = {str(n): f"LABEL_{n}" for n in range(1000)}
    served = load(Model(checkpoint=folder_of(tmp_path, 1000, id2label=named)))
    assert served.labels[0].wnid == "n01440764"


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"variant": "dat_tiny_224"}, "is of the variant swin, expected dat_tiny_224"),
        ({"variant": "swin_nano"}, "is of the variant swin, expected swin_nano"),
        ({"image_size": 24}, "less than a window of 4; give an image_size of at least 25"),
        ({"resize_mode": "letterbox"}, "a classifier has one way to resize"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, chosen, sentence):
    path = folder_of(tmp_path)
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*({sentence})"):
        load(Model(checkpoint=path, **chosen))


def test_three_classes_without_names_need_some(tmp_path):
    with pytest.raises(CheckpointError, match="has 3 classes and no names for them"):
        load(Model(checkpoint=folder_of(tmp_path)))


@pytest.mark.parametrize("variant", ["swin", "swin_nano"])
def test_a_dat_is_no_swin(variant):
    path = loading.BUNDLED["dat_nano"]
    with pytest.raises(CheckpointError, match=r"dat_nano\.safetensors: holds no Swin"):
        load(Model(checkpoint=path, variant=variant))


@pytest.mark.slow
def test_a_converted_file_needs_no_configuration_beside_it(tmp_path):
    named = {str(n): name for n, name in enumerate(["cat", "dog", "owl"])}
    path, out = folder_of(tmp_path, id2label=named), tmp_path / "apart" / "swin.safetensors"
    out.parent.mkdir()
    ended = run("convert", "--checkpoint", path, "--out", out, "--image-size", 40)
    assert ended.returncode == 0, ended.stderr
    file = read_swin(read(out))
    assert asdict(file.config) == asdict(SMALL) | {"image_size": (40, 40)}
    served = load(Model(checkpoint=out))
    assert [label.name for label in served.labels] == ["cat", "dog", "owl"]
    original = load(Model(checkpoint=path, image_size=40))
    images = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = served.network(images), original.network(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_without_the_library_a_sentence_names_the_file_and_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        CheckpointError, match=r"swin_nano.safetensors: .* pip install -c constraints.txt '.\[swin"
    ):
        load(Model(name="swin_nano"))
