"""Models that are found in a folder."""

import shutil

import pytest
from pydantic import ValidationError

from service.computed_tasks import TASKS
from service.models.folder import FolderError
from service.models.lineup import ModelFileError, choose_models, require_files
from service.models.load import BUNDLED, LoadedModel, load
from service.settings.settings import Settings, variables

DEMO = BUNDLED["dat_nano"]
LABELS = "\n".join(f"class {index}" for index in range(12))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in variables():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DAT_MODEL__FOLDER", str(tmp_path))
    monkeypatch.setenv("DAT_MODEL__NAME", "flowers")
    return tmp_path


def found() -> list[LoadedModel]:
    lineup = choose_models(Settings())
    require_files(Settings(), lineup)
    return [load(entry, [task.loader for task in TASKS]) for entry in lineup.models]


def test_the_one_checkpoint_is_found_whatever_it_is_called(folder):
    shutil.copy(DEMO, folder / "anything 1.safetensors")
    for name in ("README.md", "config.json", ".hidden.safetensors"):
        (folder / name).write_text("{}")
    (folder / "more").mkdir()
    shutil.copy(DEMO, folder / "more" / "other.safetensors")
    (model,) = found()
    assert (model.name, model.task) == ("flowers", "classify")
    assert model.source == folder / "anything 1.safetensors"


def test_an_official_checkpoint_is_found(folder, tiny_checkpoint):
    (folder / "model.pth").symlink_to(tiny_checkpoint)
    (model,) = found()
    assert (model.name, model.config.name) == ("flowers", "dat_tiny_224")


@pytest.mark.parametrize("name", ["labels.txt", "labels.json"])
def test_labels_beside_it_are_its_labels(folder, name, monkeypatch):
    shutil.copy(DEMO, folder / "model.safetensors")
    text = LABELS if name.endswith("txt") else str(LABELS.split("\n")).replace("'", '"')
    (folder / name).write_text(text)
    (model,) = found()
    assert [label.name for label in model.labels] == LABELS.split("\n")
    other = folder / "other.txt"
    other.write_text(LABELS.replace("class", "other"))
    monkeypatch.setenv("DAT_MODEL__LABELS", str(other))
    (model,) = found()
    assert model.labels[0].name == "other 0"


def test_other_settings_of_the_model_count_for_the_checkpoint(folder, monkeypatch):
    shutil.copy(DEMO, folder / "model.safetensors")
    monkeypatch.setenv("DAT_MODEL__VERSION", "7")
    (model,) = found()
    assert model.version == "7"


def test_a_model_file_says_what_is_served(folder):
    for name in ("a", "b", "c"):
        shutil.copy(DEMO, folder / f"{name}.safetensors")
    (folder / "models.toml").write_text(
        "[[models]]\nname = 'x'\ncheckpoint = 'a.safetensors'\n"
        "[[models]]\nname = 'y'\ncheckpoint = 'b.safetensors'\n"
    )
    assert [(model.name, model.source.name) for model in found()] == [
        ("x", "a.safetensors"), ("y", "b.safetensors"),
    ]  # fmt: skip


def test_the_name_is_that_of_a_model_that_has_none_of_its_own(folder):
    shutil.copy(DEMO, folder / "a.safetensors")
    file = folder / "models.toml"
    file.write_text("[[models]]\ncheckpoint = 'a.safetensors'\nversion = '3'")
    assert [(model.name, model.version) for model in found()] == [("flowers", "3")]
    file.write_text("[[models]]\ncheckpoint = 'a.safetensors'\nname = 'own'")
    assert [model.name for model in found()] == ["own"]


def test_a_setting_that_belongs_into_the_model_file_is_refused(folder, monkeypatch):
    (folder / "models.toml").write_text("[[models]]\nname = 'dat_nano'")
    monkeypatch.setenv("DAT_MODEL__VERSION", "7")
    with pytest.raises(ModelFileError, match="version belongs there"):
        choose_models(Settings())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no model: .* it is empty"),
        (["notes.md", "model.onnx"], r"neither models\.toml nor a checkpoint .*model\.onnx"),
        (["a.pth", "b.safetensors"], r"2 checkpoints, a\.pth, b\.safetensors; name those"),
        (["a.pth", "labels.txt", "labels.json"], "both labels"),
    ],
)
def test_what_is_not_clear_is_said(folder, files, message):
    for name in files:
        (folder / name).write_text("x")
    with pytest.raises(FolderError, match=message) as refusal:
        choose_models(Settings())
    assert str(refusal.value).startswith(f"DAT_MODEL__FOLDER: {folder}: ")


def test_a_folder_that_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setenv("DAT_MODEL__FOLDER", str(folder / "none"))
    with pytest.raises(FolderError, match="none: No such file"):
        choose_models(Settings())


@pytest.mark.parametrize("other", ["FILE", "CHECKPOINT"])
def test_another_place_of_the_model_beside_the_folder_is_refused(folder, other, monkeypatch):
    if other == "FILE":
        monkeypatch.delenv("DAT_MODEL__NAME")
    monkeypatch.setenv(f"DAT_MODEL__{other}", "/x")
    with pytest.raises(ValidationError, match=f"folder and {other.lower()} both say"):
        Settings()


def test_a_label_file_that_cannot_be_read_is_named(folder):
    shutil.copy(DEMO, folder / "model.safetensors")
    (folder / "labels.txt").symlink_to(folder / "gone.txt")
    (model,) = found()  # nothing is there
    assert model.labels[0].name != "class 0"
