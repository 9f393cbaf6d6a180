import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from service import cli
from service.computed_tasks import TASKS
from service.models.lineup import choose_models
from service.models.load import load
from service.settings.settings import Settings, variables
from tests.server import ROOT
from tests.service.commands import run_all


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in variables():
        monkeypatch.delenv(name, raising=False)


def test_the_defaults_serve_the_demo_model():
    loaders = [task.loader for task in TASKS]
    assert load(choose_models(Settings()).find(None), loaders).name == "dat_nano"


def test_a_variable_sets_its_field(monkeypatch):
    monkeypatch.setenv("DAT_BATCHING__BUCKETS", "[1, 2, 4]")
    monkeypatch.setenv("DAT_SERVER__HTTP_PORT", "9000")
    settings = Settings()
    assert settings.batching.buckets == (1, 2, 4)
    assert settings.server.http_port == 9000


def test_a_list_may_be_written_with_commas_and_blanks_around_a_value_do_not_count(monkeypatch):
    monkeypatch.setenv("DAT_BATCHING__BUCKETS", " 1, 2,4 ")
    monkeypatch.setenv("DAT_MODEL__IMAGE_SIZE", "64,96")
    monkeypatch.setenv("DAT_MODEL__LABELS", " /labels.txt\n")
    monkeypatch.setenv("DAT_LOG__FORMAT", "json ")
    settings = Settings()
    assert settings.batching.buckets == (1, 2, 4)
    assert settings.model.image_size == (64, 96)
    assert str(settings.model.labels) == "/labels.txt"
    assert settings.log.format == "json"


def test_one_number_is_a_list_of_one_bucket_and_both_sides_of_an_image(monkeypatch):
    monkeypatch.setenv("DAT_BATCHING__BUCKETS", "4")
    monkeypatch.setenv("DAT_MODEL__IMAGE_SIZE", "384")
    assert Settings().batching.buckets == (4,)
    assert Settings().model.image_size == 384


def test_an_empty_variable_is_not_set(monkeypatch):
    for name in variables():
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("DAT_MODEL__CHECKPOINT", "  ")
    assert Settings() == Settings.model_construct()
    assert Settings().model.model_fields_set == set()


def test_variables_of_kubernetes_for_services_are_not_ours(monkeypatch):
    service = {
        "DAT_SERVE_SERVICE_HOST": "10.0.0.1",
        "DAT_SERVE_SERVICE_PORT": "8000",
        "DAT_SERVE_SERVICE_PORT_HTTP": "8000",
        "DAT_SERVE_PORT": "tcp://10.0.0.1:8000",
        "DAT_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "DAT_SERVE_PORT_8000_TCP_PROTO": "tcp",
        "DAT_SERVE_PORT_8000_TCP_PORT": "8000",
        "DAT_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "DAT_PORT": "tcp://10.0.0.2:80",
    }
    for name, value in service.items():
        monkeypatch.setenv(name, value)
    Settings()


@pytest.mark.parametrize(
    "name",
    [
        "DAT_BATCHING__MAX_BTACH",
        "DAT_BATHCING__MAX_BATCH",
        "DAT_PORT",
        "DAT_SERVER_PORT",
        "DAT_SERVER__SERVICE_HOST",
        "DAT_BATCHING",
        "DAT_BATCHING__BUCKETS__0",
    ],
)
def test_a_misspelt_variable_is_refused_by_name(monkeypatch, name):
    monkeypatch.setenv(name, "3")
    with pytest.raises(ValidationError, match=name):
        Settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DAT_SERVER__HTTP_PORT", "70000", "equal to 65535; it is '70000'"),
        ("DAT_SERVER__HTTP_PORT", "x", "valid integer"),
        ("DAT_SERVER__HTTP_PORT", "80.5", "valid integer"),
        ("DAT_SERVER__HOST", "nowhere.invalid", "neither an address nor a name"),
        ("DAT_SERVER__HOST", "a" * 100, "neither an address nor a name"),
        ("DAT_SERVER__DRAIN_DELAY_S", "1e300", "equal to 86400"),
        ("DAT_SERVER__DRAIN_GRACE_S", "inf", "finite"),
        ("DAT_LIMITS__DEFAULT_TIMEOUT_S", "nan", "finite"),
        ("DAT_LIMITS__MAX_IMAGES", "1000", "DAT_BATCHING__QUEUE_LIMIT"),
        ("DAT_LIMITS__MAX_BODY_BYTES", "1000", "DAT_LIMITS__MAX_IMAGE_BYTES"),
        ("DAT_LIMITS__MAX_BODY_BYTES", "3000000000", "equal to 2146435072"),
        ("DAT_LIMITS__MAX_IMAGE_BYTES", "-1", "greater than 0"),
        ("DAT_LIMITS__DECODE_THREADS", "100000", "equal to 512"),
        ("DAT_ENGINE__THREADS", "100000", "equal to 512"),
        ("DAT_SERVER__HTTP_PORT", "8001", "http_port and grpc_port are both 8001"),
        ("DAT_SERVER__METRICS_PORT", "8001", "grpc_port and metrics_port are both 8001"),
        ("DAT_SERVER__CORS_ORIGINS", "https://example.com/", "as in https://example.com, without"),
        ("DAT_SERVER__CORS_ORIGINS", "https://*.example.com", "or * for all"),
        ("DAT_SECURITY__REQUIRE_CLIENT_CERTIFICATE", "true", "needs client_ca"),
        ("DAT_ENGINE__DEVICE", "tpu", "must be auto, cpu, cuda, cuda:N or several"),
        ("DAT_ENGINE__DEVICE", "cuda:1000", "must be auto, cpu, cuda, cuda:N or several"),
        ("DAT_ENGINE__DEVICE", "cuda:1,cuda:1", "names a GPU twice"),
        ("DAT_ENGINE__DEVICE", "cuda:1,cuda:01", "must be auto, cpu, cuda, cuda:N or several"),
        ("DAT_ENGINE__CACHE", "/dev/null/cache", "a folder that the server can write to"),
        ("DAT_BATCHING__QUEUE_LIMIT", "0", "greater than 0"),
        ("DAT_BATCHING__QUEUE_LIMIT", "1000000000", "equal to 65536"),
        ("DAT_BATCHING__MAX_BATCH", "100000", "equal to 1024"),
        ("DAT_BATCHING__BUCKETS", "2,2", "distinct"),
        ("DAT_BATCHING__BUCKETS", "1,x", "it is 'x'"),
        ("DAT_BATCHING__BUCKETS", "[1, 2", "a list is written as in [1, 2]"),
        ("DAT_BATCHING__BUCKETS", "[" * 10_000, "a list is written as in [1, 2]"),
        ("DAT_BATCHING__SIZES", "224", "as in [[512, 512], [512, 768]]"),
        ("DAT_BATCHING__SIZES", "[512, 512]", "as in [[512, 512], [512, 768]]"),
        ("DAT_BATCHING__SIZES", "[[64, 64, 64]]", "as in [[512, 512], [512, 768]]"),
        ("DAT_MODEL__IMAGE_SIZE", "224x320", "as in [224, 320]; it is '224x320'"),
        ("DAT_MODEL__IMAGE_SIZE", "[224]", "as in [224, 320]; it is '[224]'"),
        ("DAT_MODEL__IMAGE_SIZE", "1,2,3", "as in [224, 320]; it is '1,2,3'"),
        ("DAT_MODEL__SHA256", "abc", "must be 64 hexadecimal digits"),
        ("DAT_BATCHING__SIZES", "[[224, 32]]", "equal to 33"),  # one cell
        ("DAT_MODEL__IMAGE_SIZE", "100000", "equal to 4096"),
        ("DAT_MODEL__IMAGE_SIZE", "[64, 100000]", "equal to 4096; it is 100000"),
        ("DAT_MODEL__NAME", "a\n\x1b[31m", r"it is 'a\n\x1b[31m'"),
        ("DAT_MODEL__VERSION", "2/3", "so that it can stand in a path"),
        ("DAT_MODEL__NAME", "my model", "must be of letters, digits, dots, dashes and underscores"),
        ("DAT_MODEL__RESIZE_MODE", "stretched", "'official' or 'letterbox'"),
        ("DAT_MODEL__LETTERBOX_SIZE", "32", "equal to 64"),  # one cell
        ("DAT_MODEL__LETTERBOX_SIZE", "100", "multiple of 32"),
        ("DAT_MODEL__CHECKPOINT", "/nowhere.pth", "/nowhere.pth: No such file"),
        ("DAT_MODEL__CHECKPOINT", "/", "not a file"),
        ("DAT_MODEL__FOLDER", "/nowhere", "DAT_MODEL__FOLDER: /nowhere: No such file"),
        ("DAT_MODEL__FOLDER", "/dev/null", "DAT_MODEL__FOLDER: /dev/null: Not a directory"),
        ("DAT_MODEL__LABELS", "/nowhere.txt", "/nowhere.txt: No such file"),
        ("DAT_MODEL__LABELS", "/dev/null", "not a file"),
        ("DAT_MODEL__FILE", "/dev/zero", "not a file"),
        ("DAT_LOG__LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("DAT_MODEL", "x", "DAT_MODEL__NAME"),
        ("DAT_BATCHNG__MAX_BATCH", "4", "did you mean DAT_BATCHING__MAX_BATCH?"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_and_where(
    monkeypatch, capsys, name, value, message
):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dat-serve"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith("dat-serve: ")
    assert name.rsplit("__", 1)[0] in line
    assert message in line
    assert line.isprintable()


def test_a_file_that_may_not_be_read_is_named(monkeypatch, capsys, tmp_path):
    checkpoint = tmp_path / "secret.pth"
    checkpoint.touch(mode=0o000)
    monkeypatch.setenv("DAT_MODEL__CHECKPOINT", str(checkpoint))
    monkeypatch.setattr(sys, "argv", ["dat-serve"])
    user = os.geteuid()
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    os.seteuid(user or 65534)  # root may read everything
    try:
        with pytest.raises(SystemExit):
            cli.main()
    finally:
        os.seteuid(user)
    assert f"DAT_MODEL__CHECKPOINT: {checkpoint}: Permission denied" in capsys.readouterr().err


def test_a_wrong_setting_does_not_wait_for_torch():
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "service"],
        cwd=ROOT,
        env=os.environ | {"DAT_MODEL__LABELS": "/nowhere.txt"},
        capture_output=True,
        text=True,
    )
    assert "dat-serve: DAT_MODEL__LABELS" in ended.stderr
    assert "pydantic_settings" in ended.stderr
    assert "torch" not in ended.stderr
    assert "grpc" not in ended.stderr


def test_whoever_reads_the_table_may_leave_before_its_end():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as left:
        command = [sys.executable, "-m", "service", "settings"]
        ended = subprocess.run(command, cwd=ROOT, stdout=left, stderr=subprocess.PIPE)
    assert ended.stderr == b""


def test_each_core_has_a_thread_that_decodes_unless_a_number_is_set(monkeypatch):
    assert Settings().limits.decoders == os.cpu_count()
    monkeypatch.setenv("DAT_LIMITS__DECODE_THREADS", "7")
    assert Settings().limits.decoders == 7


@pytest.mark.slow
def test_the_command_refuses_what_only_the_models_and_devices_tell():
    messages = {
        ("DAT_MODEL__NAME", "resnet"): "resnet",
        ("DAT_MODEL__NAME", "dat_tiny_224"): "DAT_MODEL__CHECKPOINT",
        ("DAT_ENGINE__DEVICE", "cuda:9"): "cuda:9",
    }
    refusals = run_all(((), dict([bad])) for bad in messages)
    for ended, message in zip(refusals, messages.values(), strict=True):
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_every_setting_is_described():
    assert all(group.model_fields[field].description for group, field in variables().values())


@pytest.mark.parametrize("name", [name for name in variables() if name.endswith("_S")])
def test_every_time_has_a_bound_or_timers_could_not_hold_it(monkeypatch, name):
    monkeypatch.setenv(name, "1e300")
    with pytest.raises(ValidationError, match="equal to 86400"):
        Settings()


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("DAT_SERVER__FRONT_ENDS", "2", "DAT_SERVER__FRONT_ENDS=0"),
        ("DAT_SERVER__FRONT_ENDS", "auto", "DAT_SERVER__FRONT_ENDS=0"),
        ("DAT_SERVER__OPEN_INFERENCE", "false", "DAT_SERVER__OPEN_INFERENCE=true"),
    ],
)
def test_shared_memory_needs_one_process_and_its_protocol(monkeypatch, name, value, needed):
    monkeypatch.setattr("service.settings.settings.cores", lambda: 8)
    monkeypatch.setenv("DAT_LIMITS__MAX_SHARED_MEMORY_BYTES", "1000")
    Settings()
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=needed):
        Settings()


def test_models_are_not_controlled_over_a_protocol_that_is_not_served(monkeypatch):
    monkeypatch.setenv("DAT_SERVER__MODEL_CONTROL", "true")
    assert Settings().server.model_control
    monkeypatch.setenv("DAT_SERVER__OPEN_INFERENCE", "false")
    with pytest.raises(ValidationError, match="model_control needs open_inference"):
        Settings()


@pytest.mark.parametrize(
    ("cores", "device", "front_ends"),
    [(1, "cpu", 0), (2, "cpu", 0), (4, "cpu", 3), (4, "cuda:0,cuda:1", 2), (4, "cpu,cpu,cpu", 0)],
)
def test_front_ends_have_cores_that_no_device_has(monkeypatch, cores, device, front_ends):
    monkeypatch.setattr("service.settings.settings.cores", lambda: cores)
    monkeypatch.setenv("DAT_SERVER__FRONT_ENDS", "auto")
    monkeypatch.setenv("DAT_ENGINE__DEVICE", device)
    assert Settings().front_ends == front_ends
