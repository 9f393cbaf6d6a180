import pytest
import yaml


@pytest.fixture(scope="module")
def compose(root):
    return yaml.safe_load((root / "docker-compose.yml").read_text())


@pytest.fixture
def server_settings(compose, settings_of):
    return settings_of(compose["services"]["server"].get("environment", {})).server


def seconds(duration):
    return float(duration.removesuffix("s"))


def test_the_stop_waits_longer_than_the_drain_takes(compose, server_settings):
    grace = seconds(compose["services"]["server"]["stop_grace_period"])
    assert grace > server_settings.drain_delay_s + server_settings.drain_grace_s


def test_the_health_check_needs_no_shell(compose):
    assert compose["services"]["server"]["healthcheck"]["test"] == [
        "CMD",
        "dat-serve",
        "healthcheck",
    ]


def test_http_and_grpc_are_published_and_metrics_are_not(compose, server_settings):
    published = {port.split(":")[-1] for port in compose["services"]["server"]["ports"]}
    assert published == {str(server_settings.http_port), str(server_settings.grpc_port)}


def test_the_server_writes_to_tmp_only(compose):
    server = compose["services"]["server"]
    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp"]
    assert "no-new-privileges:true" in server["security_opt"]


def test_the_image_has_the_version_of_the_project(root, compose):
    name, _, version = compose["services"]["server"]["image"].partition(":")
    assert name == "dat-serve"
    assert f'version = "{version}"' in (root / "pyproject.toml").read_text()


def test_mounted_files_exist(root, compose):
    for volume in compose["services"]["prometheus"]["volumes"]:
        assert (root / volume.split(":")[0]).is_file()


def test_prometheus_scrapes_the_server(root, compose, server_settings):
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in compose["services"]
    assert int(port) == server_settings.metrics_port


def test_prometheus_accepts_its_configuration(root, run_tool):
    run_tool("promtool", "check", "config", root / "deploy/prometheus/prometheus.yml")
