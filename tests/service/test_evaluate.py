import asyncio
import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demo.folder import write
from demo.scenes import CLASSES
from model import checkpoint as checkpoints
from model.detection import create_detector
from service.evaluation.accuracy import Accuracy, find_images, top_k_accuracy
from service.evaluation.coco import CocoPrecision
from service.evaluation.run import EvaluationError, evaluate
from service.models.card import Label
from service.models.lineup import choose_models
from service.settings.settings import Settings
from service.tasks.masks import Mask, run_lengths
from tests.clients import JPEG, encoded
from tests.service.commands import command, run, run_all

pytestmark = pytest.mark.slow

SCENES = 150


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write(folder, SCENES, seed=1)
    return folder


@pytest.fixture(scope="module")
def figures(scenes, tmp_path_factory):
    """Of one run from beginning to end."""
    journal = tmp_path_factory.mktemp("journal") / "whole.jsonl"
    ended = run("evaluate", "--data", scenes, "--journal", journal)
    assert ended.returncode == 0, ended.stderr
    assert f"{SCENES}/{SCENES}" in ended.stderr  # the progress bar
    return json.loads(ended.stdout)


def accuracy(figures):
    return {name: figures[name] for name in ("images", "unreadable", "top1", "top5")}


def test_the_demo_model_is_measured(figures):
    assert figures["model"] == "dat_nano"
    assert (figures["images"], figures["unreadable"]) == (SCENES, 0)
    assert 0.97 <= figures["top1"] <= figures["top5"] <= 1


def test_an_evaluation_that_was_cut_off_goes_on_to_the_same_result(scenes, figures, tmp_path):
    journal = tmp_path / "cut.jsonl"
    arguments = ("evaluate", "--data", scenes, "--journal", journal)
    process = command(*arguments, DAT_BATCHING__MAX_BATCH=1, DAT_ENGINE__THREADS=1)
    while not journal.exists() or len(journal.read_text().splitlines()) < 10:
        assert process.poll() is None
        sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    answered = len(journal.read_text().splitlines()) - 1
    assert answered < SCENES
    with journal.open("a") as file:
        file.write('{"image": "star/00')  # the line that was being written

    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    resumed = json.loads(ended.stdout)
    assert accuracy(resumed) == accuracy(figures)
    assert 0 < resumed["answered_now"] <= SCENES - answered + 1
    again = json.loads(run(*arguments).stdout)
    assert again["answered_now"] == 0
    assert accuracy(again) == accuracy(figures)


def test_an_interrupt_says_how_to_go_on(scenes, tmp_path):
    journal = tmp_path / "interrupted.jsonl"
    process = command("evaluate", "--data", scenes, "--journal", journal)
    while not journal.exists() or len(journal.read_text().splitlines()) < 5:
        assert process.poll() is None
        sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 1
    assert f"the same command goes on from {journal}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["cancelled", "a file is gone"])
def test_an_evaluation_that_ends_early_leaves_no_request_behind(scenes, tmp_path, how):
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    journal = tmp_path / "journal.jsonl"

    async def end_early():
        settings = Settings()
        entry = choose_models(settings).find(None)
        task = asyncio.create_task(evaluate(Accuracy(folder), entry, settings, journal))
        while not journal.exists() or len(journal.read_text().splitlines()) < 5:
            await asyncio.sleep(0)
        if how == "cancelled":
            task.cancel()
        else:
            shutil.rmtree(folder)
        await asyncio.wait([task])
        left = asyncio.all_tasks() - {asyncio.current_task()}
        return None if task.cancelled() else task.exception(), left

    with ThreadPoolExecutor(1) as thread:  # an evaluation sets the OpenMP threads of its own
        failure, left = thread.submit(asyncio.run, end_early()).result()
    assert left == set()
    if how == "cancelled":
        assert failure is None
    else:
        assert isinstance(failure, EvaluationError)
        assert "No such file" in str(failure)


def test_a_journal_of_something_else_is_refused_and_kept(scenes, tmp_path):
    journal = tmp_path / "other.jsonl"
    journal.write_text('{"model": "other"}\n')
    ended = run("evaluate", "--data", scenes, "--journal", journal)
    assert ended.returncode == 1
    assert "journal of another evaluation" in ended.stderr
    assert journal.read_text() == '{"model": "other"}\n'
    journal.write_text("a letter\n")
    ended = run("evaluate", "--data", scenes, "--journal", journal)
    assert ended.returncode == 1
    assert "not a journal" in ended.stderr


def test_images_that_cannot_be_decoded_count_as_wrong(tmp_path):
    for name, content in (
        ("star/a.jpg", b"no picture"),
        ("star/b.JPEG", JPEG),
        ("ring/c.png", b""),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "star" / "notes.txt").write_text("is left out")
    ended = run("evaluate", "--data", tmp_path, "--journal", tmp_path / "j.jsonl")
    figures = json.loads(ended.stdout)
    assert (figures["images"], figures["unreadable"]) == (3, 2)
    assert figures["top1"] <= 1 / 3


@pytest.mark.parametrize("options", [("--model", "other"), ("--data", "/nowhere")])
def test_what_is_not_there_is_refused(tmp_path, options):
    arguments = {"--data": tmp_path, "--journal": tmp_path / "j.jsonl"} | dict([options])
    ended = run("evaluate", *(part for pair in arguments.items() for part in pair))
    assert ended.returncode == 1
    assert options[1] in ended.stderr
    assert "Traceback" not in ended.stderr


def folder_of(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "image.jpg").write_bytes(b"")
    return tmp_path


LABELS = [Label("crane", "n3"), Label("bat", "n1"), Label("crane", "n2")]


@pytest.mark.parametrize(
    ("labels", "names", "targets"),
    [
        (LABELS, ["n1", "n2", "n3"], [1, 2, 0]),
        (LABELS, ["n2"], [2]),
        (LABELS, ["a", "b", "c"], [0, 1, 2]),
        ([Label("b"), Label("a")], ["a", "b"], [1, 0]),
        ([Label("b"), Label("a")], ["b"], [0]),
    ],
)
def test_subfolders_are_classes_by_id_by_name_or_in_order(tmp_path, labels, names, targets):
    images = find_images(folder_of(tmp_path, *names), labels)
    assert list(images.values()) == targets


def test_subfolders_that_are_not_the_classes_are_refused(tmp_path):
    folder = folder_of(tmp_path, "n1", "other")
    with pytest.raises(EvaluationError, match="has 2 subfolders"):
        find_images(folder, LABELS)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.permutations(range(10)), st.booleans()), min_size=1)
)
def test_accuracy_is_the_share_of_right_answers(cases):
    found = top_k_accuracy([(t, list(best[:5]) if ok else None) for t, best, ok in cases])
    ranks = [best.index(target) if ok else 10 for target, best, ok in cases]
    assert found["top1"] == sum(rank == 0 for rank in ranks) / len(cases)
    assert found["top5"] == sum(rank < 5 for rank in ranks) / len(cases)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A detector with random weights."""
    path = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    torch.manual_seed(0)
    facts = {"variant": "mask_rcnn_dat_nano", "labels": json.dumps(CLASSES)}
    checkpoints.write(path, create_detector("mask_rcnn_dat_nano").state_dict(), facts)
    return path


def annotated(folder, objects, names=CLASSES):
    """Pictures with annotations; `objects` are `(image, class, (x, y, w, h), score)`."""
    images = [{"id": 7 + n, "file_name": f"{n}.png", "width": 60, "height": 40} for n in range(3)]
    for image in images:
        (folder / image["file_name"]).write_bytes(encoded("PNG", image["id"], (40, 60)))
    annotations = [
        {
            "id": number + 1,
            "image_id": 7 + image,
            "category_id": 100 + names.index(name),
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [rectangle(box)],
        }
        for number, (image, name, box, _) in enumerate(objects)
    ]
    categories = [{"id": 100 + index, "name": name} for index, name in enumerate(names)]
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def rectangle(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


OBJECTS = [
    (0, "star", (4, 5, 20, 10), 0.9),
    (0, "ring", (30, 8, 12, 30), 0.8),
    (2, "star", (0, 0, 60, 40), 0.7),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools under NumPy 2
@pytest.mark.parametrize(("wrong", "precision"), [(False, 1.0), (True, 0.7525)])
def test_precision_is_that_of_pycocotools(tmp_path, wrong, precision):
    """Perfect detections have a precision of 1; a missed star of two costs a quarter."""
    evaluation = CocoPrecision(tmp_path, annotated(tmp_path, OBJECTS))
    evaluation._categories, evaluation._has_masks = [100 + n for n in range(12)], True
    answers = {f"{image}.png": [] for image in range(3)}
    for image, name, (x, y, w, h), score in OBJECTS:
        if wrong and image == 2:
            continue
        pixels = np.ones((h, w), bool)
        answers[f"{image}.png"].append(
            {
                "category_id": 100 + CLASSES.index(name),
                "score": score,
                "bbox": [x, y, w, h],
                "segmentation": {
                    "size": [40, 60],
                    "counts": run_lengths(Mask(y, x, pixels, (40, 60))),
                },
            }
        )
    figures = evaluation.measure(answers)
    for kind in ("box", "mask"):
        assert figures[kind]["ap"] == pytest.approx(precision, abs=1e-3)
        assert figures[kind]["ap50"] == pytest.approx(precision, abs=1e-3)


def test_a_detector_is_measured_and_goes_on_from_its_journal(tmp_path, detector):
    annotations = annotated(tmp_path, OBJECTS)
    arguments = ("--data", tmp_path, "--coco", annotations, "--journal", tmp_path / "j.jsonl")
    first, second = (run("evaluate", *arguments, DAT_MODEL__CHECKPOINT=detector) for _ in range(2))
    assert first.returncode == 0, first.stderr
    figures, again = json.loads(first.stdout), json.loads(second.stdout)
    assert (figures["model"], figures["images"]) == ("mask_rcnn_dat_nano", 3)
    assert 0 <= figures["box"]["ap"] <= figures["box"]["ap50"] <= 1
    assert figures["mask"].keys() == figures["box"].keys()
    assert (figures["answered_now"], again["answered_now"]) == (3, 0)
    assert again["box"] == figures["box"]


def test_a_detector_is_measured_in_a_letterbox(tmp_path, detector):
    annotations = annotated(tmp_path, OBJECTS)
    arguments = ("--data", tmp_path, "--coco", annotations, "--journal", tmp_path / "j.jsonl")
    settings = {"DAT_MODEL__CHECKPOINT": detector, "DAT_MODEL__LETTERBOX_SIZE": 96}
    ended = run("evaluate", *arguments, "--resize-mode", "letterbox", **settings)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert (figures["resize_mode"], figures["letterbox_size"]) == ("letterbox", 96)
    asked = CocoPrecision(tmp_path, annotations, "letterbox").options(timeout_s=1)
    assert asked.resize_mode == "letterbox"
    other, classifier = run_all(
        (
            (("evaluate", *arguments), settings),
            (("evaluate", "--data", tmp_path, "--resize-mode", "letterbox"), {}),
        )
    )
    assert other.returncode == 1
    assert "journal of another evaluation" in other.stderr
    assert classifier.returncode == 1
    assert "--resize-mode is for detectors" in classifier.stderr


def edited(folder, edit):
    """The annotations after an edit of them."""
    path = annotated(folder, OBJECTS)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def without(*fields):
    def edit(content):
        for annotation in content["annotations"]:
            for field in fields:
                del annotation[field]

    return edit


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools under NumPy 2
@pytest.mark.parametrize("left_out", ["segmentation", "iscrowd", "area", "id"])
def test_what_annotations_may_leave_out_changes_no_precision_of_boxes(tmp_path, left_out):
    evaluation = CocoPrecision(tmp_path, edited(tmp_path, without(left_out)))
    evaluation._categories, evaluation._has_masks = [100 + n for n in range(12)], False
    answers = {f"{image}.png": [] for image in range(3)}
    for image, name, box, score in OBJECTS:
        record = {"category_id": 100 + CLASSES.index(name), "score": score, "bbox": list(box)}
        answers[f"{image}.png"].append(record)
    figures = evaluation.measure(answers)
    assert figures.keys() == {"box"}
    assert figures["box"]["ap"] == pytest.approx(1, abs=1e-3)
    # 200, 360 and 2400 pixels: all are small and medium ones.
    assert figures["box"]["ap_small"] == pytest.approx(1, abs=1e-3)
    assert figures["box"]["ap_large"] == -1


def test_boxes_are_measured_alone_where_annotations_have_no_segmentations(tmp_path, detector):
    annotations = edited(tmp_path, without("segmentation", "iscrowd", "area"))
    annotations.write_bytes(b"\xef\xbb\xbf" + annotations.read_bytes())
    arguments = ("--data", tmp_path, "--coco", annotations, "--journal", tmp_path / "j.jsonl")
    ended = run("evaluate", *arguments, DAT_MODEL__CHECKPOINT=detector)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert figures["images"] == 3
    assert 0 <= figures["box"]["ap"] <= 1
    assert "mask" not in figures
    assert "masks are not measured" in ended.stderr


def first(field, value):
    def edit(content):
        content["annotations"][0][field] = value

    return edit


UNUSABLE = {
    "no annotations": (lambda content: content.pop("annotations"), "annotations: Field required"),
    "no images": (lambda content: content.update(images=[], annotations=[]), "images: there is"),
    "no name": (lambda content: content["categories"][3].pop("name"), r"categories\.3\.name"),
    "no file": (lambda content: content["images"][1].pop("file_name"), r"images\.1\.file_name"),
    "no box": (without("bbox"), r"annotations\.0\.bbox: Field required, and 2 more"),
    "three numbers": (first("bbox", [1, 2, 3]), r"annotations\.0\.bbox\.3"),
    "no number": (first("bbox", [1, 2, 3, "x"]), r"annotations\.0\.bbox\.3"),
    "not finite": (first("bbox", [1, 2, 3, float("inf")]), r"annotations\.0\.bbox\.3"),
    "a negative width": (first("bbox", [1, 2, -3, 4]), r"annotations\.0\.bbox\.2"),
    "a negative area": (first("area", -1), r"annotations\.0\.area"),
    "half a crowd": (first("iscrowd", 0.5), r"annotations\.0\.iscrowd"),
    "an unknown image": (first("image_id", 99), r"annotations\.0: there is no image 99"),
    "an unknown category": (first("category_id", 9), r"annotations\.0: there is no category 9"),
    "two numbers": (first("segmentation", [[1, 2]]), r"annotations\.0\.segmentation: a polygon"),
    "half a point": (first("segmentation", [[1] * 7]), r"annotations\.0\.segmentation: a polygon"),
    "short runs": (
        first("segmentation", {"size": [40, 60], "counts": [1, 2]}),
        r"annotations\.0\.segmentation: runs of 3 pixels, expected 2400",
    ),
    "another size": (
        first("segmentation", {"size": [4, 6], "counts": [24]}),
        r"annotations\.0: a segmentation of \(4, 6\) pixels, expected \(40, 60\)",
    ),
    "an image twice": (
        lambda content: content["images"].append(content["images"][0]),
        "images: the id 7 is there twice",
    ),
    "a category twice": (
        lambda content: content["categories"].append({"id": 99, "name": "star"}),
        "categories: the name 'star' is there twice",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_annotations_that_cannot_be_used_are_refused_by_place(tmp_path, kind):
    edit, message = UNUSABLE[kind]
    path = edited(tmp_path, edit)
    with pytest.raises(EvaluationError, match=message) as refusal:
        CocoPrecision(tmp_path, path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"3", "{}".encode("utf-16"), b"\x89PNG\0"])
def test_other_files_than_annotations_are_refused(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"other\.json: not COCO annotations: [^\n]+$"):
        CocoPrecision(tmp_path, path)


def test_annotations_that_do_not_fit_are_refused(tmp_path, detector):
    annotations = annotated(tmp_path, [], names=["star"])
    broken = tmp_path / "broken.json"
    broken.write_text("[")
    for folder in ("unlabelled", "gone"):
        (tmp_path / folder).mkdir()
    unlabelled = annotated(tmp_path / "unlabelled", [])
    gone = annotated(tmp_path / "gone", OBJECTS)
    asked = (
        (unlabelled, {"DAT_MODEL__CHECKPOINT": detector}, "annotates no object of these classes"),
        (gone, {"DAT_MODEL__CHECKPOINT": detector}, "gone/1.png: no such file; 1 of the 3 images"),
        (annotations, {"DAT_MODEL__CHECKPOINT": detector}, "has no category 'arrow'"),
        (annotations, {}, "dat_nano is not a detector"),
        (broken, {"DAT_MODEL__CHECKPOINT": detector}, "broken.json: not COCO annotations"),
    )
    (gone.parent / "1.png").unlink()
    refusals = run_all(
        (("evaluate", "--data", path.parent, "--coco", path), checkpoint)
        for path, checkpoint, _ in asked
    )
    for ended, (_, _, message) in zip(refusals, asked, strict=True):
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
