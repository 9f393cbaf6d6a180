import os

import pytest
from pydantic import ValidationError

from service.model_file import choose_models
from service.served_model import load
from service.settings import Settings, variables
from tests.service.commands import run_all


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in variables():
        monkeypatch.delenv(name, raising=False)


def test_the_defaults_serve_the_demo_model():
    assert load(choose_models(Settings()).find(None)).name == "dat_nano"


def test_a_variable_sets_its_field(monkeypatch):
    monkeypatch.setenv("DAT_BATCHING__BUCKETS", "[1, 2, 4]")
    monkeypatch.setenv("DAT_SERVER__HTTP_PORT", "9000")
    settings = Settings()
    assert settings.batching.buckets == (1, 2, 4)
    assert settings.server.http_port == 9000


@pytest.mark.parametrize(
    "name", ["DAT_BATCHING__MAX_BTACH", "DAT_BATHCING__MAX_BATCH", "DAT_PORT", "DAT_BATCHING"]
)
def test_a_misspelt_variable_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with pytest.raises(ValidationError, match=name):
        Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DAT_SERVER__HTTP_PORT", "70000"),
        ("DAT_BATCHING__QUEUE_LIMIT", "0"),
        ("DAT_BATCHING__BUCKETS", "[2, 2]"),
        ("DAT_ENGINE__DEVICE", "tpu"),
        ("DAT_LIMITS__MAX_IMAGES", "1000"),  # more than the queue holds
        ("DAT_LIMITS__MAX_BODY_BYTES", "1000"),  # less than an image
        ("DAT_LIMITS__DEFAULT_TIMEOUT_S", "nan"),
        ("DAT_MODEL__RESIZE_MODE", "stretched"),
        ("DAT_MODEL__LETTERBOX_SIZE", "32"),  # one cell
        ("DAT_MODEL__LETTERBOX_SIZE", "100"),  # no multiple of 32
    ],
)
def test_a_value_that_cannot_work_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings()


def test_each_core_has_a_thread_that_decodes_unless_a_number_is_set(monkeypatch):
    assert Settings().limits.decoders == os.cpu_count()
    monkeypatch.setenv("DAT_LIMITS__DECODE_THREADS", "7")
    assert Settings().limits.decoders == 7


def test_the_command_refuses_to_start_and_says_why():
    messages = {
        ("DAT_SERVER__HTTP_PROT", "1"): "DAT_SERVER__HTTP_PROT",
        ("DAT_SERVER__HTTP_PORT", "x"): "DAT_SERVER__HTTP_PORT",
        ("DAT_MODEL__NAME", "resnet"): "resnet",
        ("DAT_MODEL__NAME", "dat_tiny_224"): "DAT_MODEL__CHECKPOINT",
        ("DAT_MODEL__CHECKPOINT", "/nowhere.pth"): "/nowhere.pth",
        ("DAT_ENGINE__DEVICE", "cuda:9"): "cuda:9",
    }
    refusals = run_all(((), dict([bad])) for bad in messages)
    for ended, message in zip(refusals, messages.values(), strict=True):
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_every_setting_is_described():
    assert all(group.model_fields[field].description for group, field in variables().values())
