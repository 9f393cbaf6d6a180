"""Keys and TLS on Kubernetes: the component over each of the folders that it is made for."""

import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy/kubernetes"
COMPONENT = KUBERNETES / "secure"


@pytest.fixture(scope="module", params=["base", "cuda"])
def built(request, run_tool, tmp_path_factory):
    """What an overlay with the component builds, by kind and name."""
    folder = tmp_path_factory.mktemp("overlay")
    overlay = {
        "resources": [os.path.relpath(KUBERNETES / request.param, folder)],
        "components": [os.path.relpath(COMPONENT, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    manifests = list(yaml.safe_load_all(run_tool("kubectl", "kustomize", folder)))
    for manifest in manifests:
        for version in ("1.31", "1.37"):
            assert kubernetes_validate.validate(manifest, version, strict=True) == version
    return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}


@pytest.fixture
def pod(built):
    return built["Deployment", "dat-serve"]["spec"]["template"]["spec"]


@pytest.fixture
def server(pod):
    (container,) = pod["containers"]
    return container


@pytest.fixture
def security(built, settings_of):
    (config,) = (manifest for (kind, _), manifest in built.items() if kind == "ConfigMap")
    return settings_of(config["data"]).security


def test_the_files_of_the_settings_are_those_of_mounted_secrets(security, pod, server):
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    mounts = {
        Path(mount["mountPath"]): secrets[mount["name"]]
        for mount in server["volumeMounts"]
        if mount["name"] in secrets
    }
    paths = (security.api_keys, security.tls_certificate, security.tls_key)
    assert [(mounts[path.parent], path.name) for path in paths] == [
        ("dat-serve-keys", "keys.toml"),
        ("dat-serve-tls", "tls.crt"),
        ("dat-serve-tls", "tls.key"),
    ]
    for mount in server["volumeMounts"]:
        if mount["name"] in secrets:
            assert mount["readOnly"] is True
            assert "subPath" not in mount, "it would never change"


def test_the_server_may_read_its_secrets_and_nobody_else(pod):
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]
    modes = [v["secret"]["defaultMode"] for v in pod["volumes"] if "secret" in v]
    assert modes == [0o440] * 2


@pytest.mark.parametrize("probe", ["startup", "readiness", "liveness"])
def test_probes_ask_over_tls_what_they_asked_before(server, probe):
    base = yaml.safe_load((KUBERNETES / "base/deployment.yaml").read_text())
    (before,) = base["spec"]["template"]["spec"]["containers"]
    asked = server[f"{probe}Probe"]["httpGet"]
    assert asked == before[f"{probe}Probe"]["httpGet"] | {"scheme": "HTTPS"}


def test_services_say_that_they_speak_tls(built):
    protocols = {
        port["name"]: port["appProtocol"]
        for name in ("dat-serve", "dat-serve-grpc")
        for port in built["Service", name]["spec"]["ports"]
    }
    assert protocols == {"http": "https", "grpc": "https", "metrics": "http"}
