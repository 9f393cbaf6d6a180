from pathlib import Path

import pytest
import yaml

from tests.deploy.mounts import runs_code, tmpfs, volume

SERVERS = ["server", "server-gpu"]


@pytest.fixture(scope="module")
def compose(root):
    return yaml.safe_load((root / "docker-compose.yml").read_text())


@pytest.fixture(params=SERVERS)
def server(request, compose):
    return compose["services"][request.param]


@pytest.fixture
def gpu_server(compose):
    return compose["services"]["server-gpu"]


@pytest.fixture
def server_settings(server, settings_of):
    return settings_of(server.get("environment", {})).server


def up(compose, profile):
    """The services that are started with a profile."""
    return {
        name
        for name, service in compose["services"].items()
        if profile in service.get("profiles", [profile])
    }


def seconds(duration):
    return float(duration.removesuffix("s"))


def mounts(service):
    return dict(map(tmpfs, service["tmpfs"])) | dict(map(volume, service.get("volumes", [])))


def test_one_server_is_up_and_without_a_profile_that_for_the_cpu(root, compose):
    # Compose reads this file, and `--profile` has precedence over it.
    lines = (root / ".env").read_text().splitlines()
    (default,) = (line.removeprefix("COMPOSE_PROFILES=") for line in lines if line[0] != "#")
    assert up(compose, default) == {"server", "prometheus"}
    assert up(compose, "gpu") == {"server-gpu", "prometheus"}


def test_the_stop_waits_longer_than_the_drain_takes(server, server_settings):
    grace = seconds(server["stop_grace_period"])
    assert grace > server_settings.drain_delay_s + server_settings.drain_grace_s


def test_the_health_check_needs_no_shell(server):
    assert server["healthcheck"]["test"] == ["CMD", "dat-serve", "healthcheck"]


def test_http_and_grpc_are_published_and_metrics_are_not(server, server_settings):
    published = {port.split(":")[-1] for port in server["ports"]}
    assert published == {str(server_settings.http_port), str(server_settings.grpc_port)}


def test_the_server_has_no_more_rights_than_it_needs(server):
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "user", "cap_add", "devices"} & server.keys()


def test_the_server_writes_below_tmp_only(server):
    assert server["read_only"] is True
    assert Path("/tmp") in mounts(server)
    assert all(path.is_relative_to("/tmp") for path in mounts(server))


def test_the_image_has_the_version_of_the_project(root, compose):
    project = (root / "pyproject.toml").read_text()
    for service, suffix in [("server", ""), ("server-gpu", "-cuda")]:
        name, _, tag = compose["services"][service]["image"].partition(":")
        assert name == "dat-serve"
        assert tag.endswith(suffix)
        assert f'version = "{tag.removesuffix(suffix)}"' in project


def test_the_gpu_profile_asks_for_a_gpu_and_for_the_image_that_uses_it(
    gpu_server, dockerfile, settings_of
):
    (device,) = gpu_server["deploy"]["resources"]["reservations"]["devices"]
    assert "gpu" in device["capabilities"]
    assert device["count"] == 1
    # Not auto, which would go on without a word on the CPU.
    assert settings_of(gpu_server["environment"]).engine.device == "cuda"
    build_arguments = gpu_server["build"]["args"]
    assert build_arguments.keys() <= dockerfile.arguments.keys()
    assert dockerfile.image(build_arguments["DEVICE"]) == dockerfile.image("cuda")


def test_the_server_for_the_cpu_asks_for_no_gpu(compose):
    assert "deploy" not in compose["services"]["server"]
    assert compose["services"]["server"]["build"] == "."


def test_compiled_kernels_can_be_executed_and_outlive_the_container(
    compose, gpu_server, code_folders
):
    for folder in code_folders:
        assert runs_code(folder, mounts(gpu_server)), folder
    named = {text.split(":")[0] for text in gpu_server["volumes"]}
    assert named == compose["volumes"].keys()


def test_the_first_start_on_a_gpu_has_as_long_as_on_kubernetes(root, gpu_server):
    deployment = yaml.safe_load((root / "deploy/kubernetes/base/deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    patience = seconds(gpu_server["healthcheck"]["start_period"])
    assert patience >= probe["periodSeconds"] * probe["failureThreshold"]


def test_mounted_files_exist(root, compose):
    for mount in compose["services"]["prometheus"]["volumes"]:
        assert (root / mount.split(":")[0]).is_file()


def test_prometheus_scrapes_the_server(root, compose, server_settings):
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    gpu_server = compose["services"]["server-gpu"]
    assert host in compose["services"]
    assert host in gpu_server["networks"]["default"]["aliases"]
    assert int(port) == server_settings.metrics_port


def test_prometheus_accepts_its_configuration(root, run_tool):
    run_tool("promtool", "check", "config", root / "deploy/prometheus/prometheus.yml")
