"""Segmenters are read from official files and converted to files that say all about them."""

import json

import pytest
import torch
from safetensors import safe_open

from model.checkpoint import CheckpointError, sha256
from model.segmentation import SEGMENTERS, load_segmenter
from service.computed_tasks import TASKS
from service.models import convert as converting
from service.models import load as loading
from service.models.segmentation import SEGMENTATION
from service.settings.model import ModelChoice
from tests.model.segmentation.test_segmenter import CLASSES, PALETTE, official_content
from tests.service.commands import run

LOADERS = [task.loader for task in TASKS]
NAME = "semantic_fpn_dat_nano"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    path = tmp_path_factory.mktemp("segmenter") / "fpn_tiny.pth"
    torch.save(
        official_content(
            NAME, prefix="module.", meta={"CLASSES": CLASSES, "PALETTE": PALETTE}, num_classes=3
        ),
        path,
    )
    return path


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "fpn_tiny.safetensors"
    ended = run("convert", "--checkpoint", official, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert NAME in ended.stdout
    assert "kind 0" not in ended.stdout
    return out


def load(chosen):
    return loading.load(chosen, LOADERS)


def convert(chosen, out):
    return converting.convert(chosen, out, LOADERS)


@pytest.mark.slow
def test_a_converted_segmenter_says_what_it_is_and_where_from(official, converted):
    with safe_open(converted, framework="pt") as file:
        assert file.metadata() == {
            "variant": NAME,
            "classes": "3",
            "labels": json.dumps([{"name": name, "wnid": None} for name in CLASSES]),
            "palette": json.dumps(PALETTE),
            "source": "fpn_tiny.pth",
            "source_sha256": sha256(official),
        }


def test_a_converted_segmenter_is_the_same(official, converted):
    images = torch.randn(1, 3, 64, 97, generator=torch.Generator().manual_seed(0))
    one, other = (load_segmenter(path) for path in (official, converted))
    assert one.class_names == other.class_names == CLASSES
    assert one.palette == other.palette
    with torch.inference_mode():
        torch.testing.assert_close(one.segmenter(images), other.segmenter(images), rtol=0, atol=0)


@pytest.mark.parametrize("file", ["official", "converted"])
def test_a_segmenter_is_recognised_among_all_models(file, request):
    loaded = load(ModelChoice(checkpoint=request.getfixturevalue(file)))
    assert (loaded.task, loaded.name) == ("segment", NAME)
    assert tuple(label.name for label in loaded.labels) == CLASSES
    assert [list(label.colour or ()) for label in loaded.labels] == [list(c) for c in PALETTE]
    assert loaded.config.num_classes == 3
    assert loaded.image_size is None


def test_a_label_file_names_the_classes(official, tmp_path):
    names = ["sky", "tree", "road"]
    labels, out = tmp_path / "l.txt", tmp_path / "o.safetensors"
    labels.write_text("\n".join(names))
    convert(ModelChoice(checkpoint=official, labels=labels), out)
    assert [label.name for label in load(ModelChoice(checkpoint=out)).labels] == names
    assert load_segmenter(out).class_names == tuple(names)


def test_classes_of_ade20k_are_shown_without_the_blank(tmp_path):
    weights, out = tmp_path / "w.pth", tmp_path / "o.safetensors"
    torch.save(official_content(NAME, num_classes=150), weights)
    labels = load(ModelChoice(checkpoint=weights)).labels
    assert (len(labels), labels[7].name) == (150, "bed")
    facts = convert(ModelChoice(checkpoint=weights), out)
    assert json.loads(facts["labels"])[7]["name"] == "bed "
    assert len(json.loads(facts["palette"])) == 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 640}, "a segmenter takes every image at a size of its own"),
        ({"resize_mode": "letterbox"}, "a segmenter has one way to resize"),
        ({"variant": "upernet_dat_pp_tiny"}, "not a checkpoint of upernet_dat_pp_tiny"),
        ({"labels": __file__}, r"test_segmentation\.py: line"),
    ],
)
def test_a_segmenter_that_cannot_be_converted_is_refused(official, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        convert(ModelChoice(checkpoint=official, **options), tmp_path / "o.safetensors")
    assert not list(tmp_path.iterdir())


def test_classes_without_names_need_a_label_file(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(official_content(NAME, num_classes=4), weights)
    with pytest.raises(CheckpointError, match=r"has 4 classes and no names for them: give a label"):
        convert(ModelChoice(checkpoint=weights), tmp_path / "o.safetensors")


def test_all_segmenters_are_variants_of_one_loader():
    assert set(SEGMENTATION.variants) == SEGMENTERS.keys()
