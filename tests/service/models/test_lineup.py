import pytest
from pydantic import ValidationError

from service.models.lineup import ModelEntry, ModelFileError, choose_models, require_files
from service.settings.batching import Batching
from service.settings.settings import Settings


@pytest.fixture
def write(tmp_path, monkeypatch):
    path = tmp_path / "models.toml"
    monkeypatch.setenv("DAT_MODEL__FILE", str(path))

    def write(text):
        path.write_text(text)
        return path

    return write


def test_without_a_file_the_settings_name_the_one_model(monkeypatch):
    monkeypatch.setenv("DAT_MODEL__NAME", "mine")
    monkeypatch.setenv("DAT_MODEL__IMAGE_SIZE", "[64, 96]")
    lineup = choose_models(Settings())
    assert [(entry.name, entry.image_size) for entry in lineup.models] == [("mine", (64, 96))]


def test_a_file_names_several_and_files_lie_beside_it(write, tmp_path):
    write(
        """
        default = "b"

        [[models]]
        name = "a"
        variant = "dat_tiny_224"
        checkpoint = "weights/a.pth"
        labels = "/elsewhere/labels.txt"
        image_size = 384
        dtype = "bfloat16"
        version = "7"
        weights = "ema"

        [[models]]
        name = "b"
        buckets = [1, 4]
        queue_limit = 32
        """
    )
    lineup = choose_models(Settings())
    a, b = lineup.models
    assert lineup.find(None) is b
    assert lineup.find("a") is a
    assert a.checkpoint == tmp_path / "weights" / "a.pth"
    assert str(a.labels) == "/elsewhere/labels.txt"
    assert (a.variant, a.image_size, a.dtype, a.version) == ("dat_tiny_224", 384, "bfloat16", "7")
    assert (a.weights, b.weights) == ("ema", "model")
    general = Batching(max_batch=16, queue_limit=100)
    assert a.batching(general) == general
    assert b.batching(general) == Batching(buckets=(1, 4), queue_limit=32)


def test_a_byte_order_mark_does_not_count(write):
    write("\ufeff[[models]]\nname = 'a'")
    assert choose_models(Settings()).find(None).name == "a"


@pytest.mark.parametrize("field", ["checkpoint", "labels"])
@pytest.mark.parametrize("name", ["missing", ".", "a\\u0000b"])
def test_files_that_a_model_is_made_of_are_looked_at_before_it_is_loaded(write, field, name):
    path = write(f"[[models]]\nname = 'a'\n{field} = \"{name}\"")
    with pytest.raises(ModelFileError) as refusal:
        require_files(Settings(), choose_models(Settings()))
    assert str(refusal.value).startswith(f"{path}: a: {field}: {path.parent}")


def test_own_limits_of_a_batch_replace_the_general_ones_or_are_refused():
    general = Batching(buckets=(1, 8))
    assert ModelEntry(max_batch=4).batching(general) == Batching(max_batch=4)
    with pytest.raises(ValidationError):
        ModelEntry(max_batch=4, buckets=(1, 8)).batching(general)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "models: Field required"),
        ("models = []", "models"),
        ("[[models", "models.toml"),
        ("[[models]]\nname = 'a'\ncolour = 1", r"models\.0\.colour: there is no such field$"),
        ("[[models]]\nchekpoint = 'a'", r"models\.0\.chekpoint: .*; did you mean checkpoint\?"),
        ("[[model]]\nname = 'a'", r"model: there is no such field; did you mean models\?"),
        ("[[models]]\nname = '../a'", r"models\.0\.name"),
        ("[[models]]\nname = 'a'\nsha256 = 'x'", r"models\.0\.sha256"),
        ("[[models]]\nname = 'a'\n[[models]]\nname = 'a'", "two models are called a"),
        ("[[models]]\nname = 'a'\n[[models]]\nversion = '2'", "every model needs a name"),
        ("default = 'b'\n[[models]]\nname = 'a'", "default 'b' is none of a"),
        ("[[models]]\nname = 'a'\nqueue_limit = 3", "a: queue_limit must not be under"),
        ("[[models]]\nname = 'a'\nbuckets = [2, 2]", "a: buckets must be distinct sizes"),
        (
            "[[models]]\nname = 'a'\n[[models]]\nname = 'b'\nmax_batch = 5000",
            r"models\.toml: b: max_batch: Input should be less than",
        ),
        ("[[models]]\nqueue_limit = 3", r"models\.toml: queue_limit must not be under"),
        ("[[models]]\nmax_batch = 5000", r"models\.toml: max_batch: Input should be less than"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_file_and_field(write, text, message):
    path = write(text)
    with pytest.raises(ModelFileError, match=message) as refusal:
        choose_models(Settings())
    assert str(refusal.value).startswith(f"{path}: ")


def test_a_byte_order_mark_before_a_file_does_no_harm(write):
    path = write("\ufeff[[models]]\r\nname = 'a'\r\n")
    assert [entry.name for entry in choose_models(Settings()).models] == ["a"]
    path.write_text("[[models]]\nname = 'a'", "utf-16")
    with pytest.raises(ModelFileError, match=r"models\.toml: the text is in UTF-16, save it as"):
        choose_models(Settings())


def test_a_missing_file_is_refused(monkeypatch):
    monkeypatch.setenv("DAT_MODEL__FILE", "/nowhere.toml")
    with pytest.raises(ModelFileError, match=r"/nowhere\.toml"):
        choose_models(Settings())


def test_a_file_and_a_setting_of_the_model_contradict_each_other(write, monkeypatch):
    write("[[models]]\nname = 'a'")
    monkeypatch.setenv("DAT_MODEL__VERSION", "2")
    with pytest.raises(ValidationError, match="version belongs there"):
        Settings()
