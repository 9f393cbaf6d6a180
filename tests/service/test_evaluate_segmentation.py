"""A segmenter is measured on label maps, as mmsegmentation defines the figures."""

import asyncio
import json
from argparse import Namespace
from math import isclose

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.segmentation import SEGMENTERS, load_segmenter
from service.cli import _contradiction
from service.evaluation.label_maps import IGNORED, LabelMaps, mean_iou, measured
from service.evaluation.run import EvaluationError
from service.evaluation.segmentation import evaluate_segmenter
from service.models.lineup import choose_models
from service.settings.settings import Settings
from tests.model.detection.recipe import picture
from tests.model.segmentation.conftest import segmenter_state, small_config
from tests.service.commands import run

CLASSES = 4
NAMES = [f"kind {index}" for index in range(CLASSES)]

pixels = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(-1, CLASSES - 1)), min_size=1, max_size=40
)


def by_loops(images):
    """The figures, pixel by pixel."""
    counted = [pair for image in images for pair in image if pair[1] != IGNORED]
    iou, recalled = {}, []
    for index, name in enumerate(NAMES):
        right = sum(found == wanted == index for found, wanted in counted)
        united = sum(index in pair for pair in counted)
        wanted = sum(wanted == index for _, wanted in counted)
        iou[name] = right / united if united else None
        if wanted:
            recalled.append(right / wanted)
    present = [share for share in iou.values() if share is not None]
    return {
        "aAcc": sum(f == w for f, w in counted) / len(counted) if counted else None,
        "mIoU": sum(present) / len(present) if present else None,
        "mAcc": sum(recalled) / len(recalled) if recalled else None,
        "IoU": iou,
    }


def assert_same_figures(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same_figures(ours[name], value)
        else:
            assert ours[name] is value is None or isclose(ours[name], value, abs_tol=6e-5)


@settings(deadline=None, max_examples=60)
@given(st.lists(pixels, min_size=1, max_size=4))
def test_figures_are_those_of_all_pixels_together(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("maps")
    maps = LabelMaps(folder, folder)
    answers = {}
    for number, image in enumerate(images):
        found, wanted = np.array(image).T
        save(folder / f"{number}.png", np.where(wanted == IGNORED, 255, wanted)[None])
        answers[f"{number}.jpg"] = maps.areas(f"{number}.jpg", found[None], CLASSES)
    journal = json.loads(json.dumps(list(answers.values())))
    assert_same_figures(mean_iou(journal, NAMES), by_loops(images))


def save(path, labels, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        image.putpalette([index * 3 % 256 for index in range(768)])
    image.save(path)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_zero_is_ignored_where_the_first_class_is_one(tmp_path, mode):
    stored = np.array([[0, 1, 4, 255]])
    save(tmp_path / "a.png", stored, mode)
    kept = LabelMaps(tmp_path, tmp_path).right("a.jpg", 5)
    assert kept.tolist() == [[0, 1, 4, IGNORED]]
    reduced = LabelMaps(tmp_path, tmp_path, reduce_zero_label=True).right("a.jpg", 4)
    assert reduced.tolist() == [[IGNORED, 0, 3, IGNORED]]


def test_images_that_cannot_be_decoded_count_as_wrong(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 0, 1, 255]]))
    maps = LabelMaps(tmp_path, tmp_path)
    figures = measured(maps, {"a.jpg": None}, NAMES)
    assert figures["aAcc"] == figures["mIoU"] == figures["mAcc"] == 0
    assert figures["IoU"] == {"kind 0": 0, "kind 1": 0, "kind 2": None, "kind 3": None}


def images_and_maps(folder, files=("a.jpg",)):
    for file in files:
        save(folder / "images" / file, np.zeros((8, 8)))
        save((folder / "maps" / file).with_suffix(".png"), np.zeros((8, 8)))
    return LabelMaps(folder / "images", folder / "maps")


def test_images_are_found_with_their_maps_in_subfolders(tmp_path):
    maps = images_and_maps(tmp_path, ("b.jpg", "deep/a.JPEG", "c.png"))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    assert maps.files() == ["b.jpg", "c.png", "deep/a.JPEG"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "maps").rename(folder / "m"), "maps: no such folder"),
        (lambda folder: (folder / "images" / "a.jpg").unlink(), r"images: no \.jpeg, \.jpg"),
        (lambda folder: (folder / "maps" / "a.png").unlink(), r"a\.png: no such file; 1 of the 1"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, change, message):
    maps = images_and_maps(tmp_path)
    change(tmp_path)
    with pytest.raises(EvaluationError, match=message):
        maps.files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_text("no picture"), r"a\.png: not a readable label map"),
        (lambda path: save(path, np.zeros((8, 9))), "image and label map have 8x8 and 9x8 pixels"),
        (
            lambda path: save(path, np.full((8, 8), 4)),
            "has the index 4, and the model tells 4 .*1 is",
        ),
        (
            lambda path: save(path, np.zeros((8, 8, 3))),
            "has pixels of mode RGB, expected one index",
        ),
    ],
)
def test_label_maps_that_cannot_be_used_are_refused(tmp_path, change, message):
    maps = images_and_maps(tmp_path)
    change(tmp_path / "maps" / "a.png")
    with pytest.raises(EvaluationError, match=message):
        maps.areas("a.jpg", np.zeros((8, 8), np.int64), CLASSES)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The settings of a small segmenter, its file, and pictures with what it says of them."""
    config = small_config("semantic_fpn")
    monkeypatch.setitem(SEGMENTERS, config.name, config)
    weights = tmp_path / "small.pth"
    meta = {"CLASSES": tuple(f"kind {index}" for index in range(7))}
    torch.save({"meta": meta, "state_dict": segmenter_state(config)}, weights)
    loaded = load_segmenter(weights)
    for index in range(3):
        image = picture(index, 60, 80)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
        save(tmp_path / "maps" / f"{index}.png", loaded.segment(image).labels.numpy() + 1)
    return replace_model(weights), tmp_path


def replace_model(weights):
    given = Settings()
    model = given.model.model_copy(update={"checkpoint": weights})
    return given.model_copy(update={"model": model})


def measure(small, **options):
    chosen, folder = small
    maps = LabelMaps(folder / "images", folder / "maps", reduce_zero_label=True)
    entry = choose_models(chosen).find(None)
    journal = folder / "journal.jsonl"
    multi_scale = options.get("multi_scale", False)
    return asyncio.run(evaluate_segmenter(maps, entry, chosen, journal, multi_scale=multi_scale))


def test_a_segmenter_is_measured_and_goes_on_from_its_journal(small):
    _, folder = small
    figures = measure(small)
    assert (figures["images"], figures["unreadable"], figures["answered_now"]) == (3, 0, 3)
    assert figures["aAcc"] == figures["mIoU"] == figures["mAcc"] == 1
    assert len(figures["IoU"]) == 7
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]) + lines[2][:9])  # the run was cut off
    again = measure(small)
    assert again["answered_now"] == 2
    assert again["IoU"] == figures["IoU"]


def test_what_is_wrong_or_unreadable_counts(small):
    _, folder = small
    (folder / "images" / "1.png").write_bytes(b"no image")
    figures = measure(small)
    assert (figures["images"], figures["unreadable"]) == (3, 1)
    assert 0.6 < figures["aAcc"] < 0.7


@pytest.mark.slow
def test_several_scales_are_other_figures_of_another_journal(small):
    _, folder = small
    assert measure(small)["multi_scale"] is False
    with pytest.raises(EvaluationError, match="the journal of another evaluation"):
        measure(small, multi_scale=True)
    (folder / "journal.jsonl").unlink()
    figures = measure(small, multi_scale=True)
    assert figures["multi_scale"] is True
    assert 0.2 < figures["aAcc"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multi_scale": True}, "for segmenters, which --segmentation measures"),
        ({"reduce_zero_label": True}, "for segmenters, which --segmentation measures"),
        ({"segmentation": "maps", "coco": "instances.json"}, "give one of the two"),
        ({"resize_mode": "letterbox", "segmentation": "maps"}, "which --coco measures"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    none = {"segmentation": None, "coco": None, "resize_mode": None}
    neither = {"multi_scale": False, "reduce_zero_label": False}
    assert message in (_contradiction(Namespace(**none | neither | options)) or "")


@pytest.mark.slow
def test_another_model_is_refused(tmp_path):
    ended = run("evaluate", "--data", tmp_path, "--segmentation", tmp_path)
    assert ended.returncode == 1
    assert "dat_nano is not a segmenter" in ended.stderr
    assert "Traceback" not in ended.stderr
