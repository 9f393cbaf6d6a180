import json
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.folder import write
from service.evaluate import EvaluationError, LabelledImage, find_images, measure
from service.served_model import Label
from tests.clients import JPEG
from tests.service.commands import command, run

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
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 1
    assert f"the same command goes on from {journal}" in err
    assert "Traceback" not in err


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
    assert [image.target for image in images] == targets


def test_subfolders_that_are_not_the_classes_are_refused(tmp_path):
    folder = folder_of(tmp_path, "n1", "other")
    with pytest.raises(EvaluationError, match="has 2 subfolders"):
        find_images(folder, LABELS)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.permutations(range(10)), st.booleans()), min_size=1)
)
def test_accuracy_is_the_share_of_right_answers(cases):
    images = [LabelledImage(f"{n}.jpg", target) for n, (target, *_) in enumerate(cases)]
    answers = {f"{n}.jpg": list(best[:5]) if ok else None for n, (_, best, ok) in enumerate(cases)}
    found = measure(images, answers)
    right = [(best.index(target) if ok else 10) for target, best, ok in cases]
    assert found.top1 == sum(rank == 0 for rank in right) / len(cases)
    assert found.top5 == sum(rank < 5 for rank in right) / len(cases)
    assert found.unreadable == sum(not ok for *_, ok in cases)
