"""The manifests for KServe, against the schemas of its kinds, and what they make of the server."""

import base64
import copy
import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml

from service.models.load import BUNDLED
from tests.clients import JPEG
from tests.deploy.kserve.prune import KINDS, MANIFESTS, schema_file
from tests.deploy.test_manifests import KUBERNETES_VERSIONS
from tests.server import start_server

RUNTIME, SERVICE = (
    yaml.safe_load((MANIFESTS / manifest).read_text()) for manifest, _ in KINDS.values()
)
(SERVER,) = RUNTIME["spec"]["containers"]
PREDICTOR = SERVICE["spec"]["predictor"]
MODELS = "/mnt/models"  # where KServe puts what storageUri names
# Beside `model`, what of a predictor is not of its pods.
SCALING = {"minReplicas", "maxReplicas", "model"}


def faults(manifest: dict[str, Any]) -> list[str]:
    schema = json.loads(schema_file(manifest["kind"]).read_text())
    return [fault.message for fault in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


def environment() -> dict[str, str]:
    """The variables of the server, as KServe fills them in."""
    name = SERVICE["metadata"]["name"]
    requests = {f"requests.{key}": value for key, value in SERVER["resources"]["requests"].items()}
    return {
        one["name"]: one["value"].replace("{{.Name}}", name)
        if "value" in one
        else requests[one["valueFrom"]["resourceFieldRef"]["resource"]]
        for one in SERVER["env"]
    }


@pytest.mark.parametrize("manifest", [RUNTIME, SERVICE], ids=lambda one: one["kind"])
def test_a_manifest_fits_the_schema_of_its_kind(manifest):
    assert faults(manifest) == []


def places(value: Any) -> Iterator[Any]:
    """Every mapping within one whose fields the schema names."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, dict | list):
            yield from places(one)


@pytest.mark.parametrize("manifest", [RUNTIME, SERVICE], ids=lambda one: one["kind"])
def test_a_field_that_kserve_does_not_know_is_found_wherever_it_is(manifest):
    metadata, free = manifest["metadata"], ("annotations", "requests", "limits")
    count = len(list(places(manifest)))
    for index in range(count):
        changed = copy.deepcopy(manifest)
        place = list(places(changed))[index]
        parents = [one for one in places(changed) if place in one.values()]
        names = [name for one in parents for name, value in one.items() if value is place]
        if place in places(changed["metadata"]) or any(name in free for name in names):
            continue  # names of the cluster and of its people
        place["bogusField"] = 1
        assert faults(changed), place
    assert metadata == manifest["metadata"]
    wrong = copy.deepcopy(manifest)
    wrong["spec"] = [wrong["spec"]]
    assert faults(wrong)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_pods_that_kserve_makes_fit_their_schema(version):
    pod = {key: value for key, value in PREDICTOR.items() if key not in SCALING}
    pod |= {"containers": [SERVER], "volumes": RUNTIME["spec"]["volumes"]}
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_kserve_finds_the_runtime_of_the_service():
    model, runtime = PREDICTOR["model"], RUNTIME["spec"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    formats = {(one["name"], one["version"]) for one in runtime["supportedModelFormats"]}
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in runtime["protocolVersions"]
    assert set(runtime["protocolVersions"]) == {"v2", "grpc-v2"}
    assert SERVER["name"] == "kserve-container"


def test_the_server_accepts_the_environment(settings_of):
    settings = settings_of(environment())
    assert str(settings.model.folder) == MODELS
    ports = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
    # The first is port 80 of the Service.
    assert list(ports) == ["http1", "h2c"]
    assert ports == {"http1": settings.server.http_port, "h2c": settings.server.grpc_port}
    annotations = RUNTIME["spec"]["annotations"]
    assert int(annotations["prometheus.kserve.io/port"]) == settings.server.metrics_port
    drain_s = settings.server.drain_delay_s + settings.server.drain_grace_s
    assert drain_s < 30  # what Kubernetes gives a pod that says nothing
    assert drain_s < PREDICTOR["terminationGracePeriodSeconds"]
    (mount,) = SERVER["volumeMounts"]
    assert mount["mountPath"] == "/tmp"  # of metrics; the root is read-only


def test_probes_ask_for_paths_that_are_there(server):
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = SERVER[probe]["httpGet"]
        assert asked["port"] == SERVER["ports"][0]["containerPort"]
        assert httpx.get(server.http_url + asked["path"]).status_code == 200


def test_what_kustomize_builds_has_the_image_of_the_project(run_tool, root):
    (built,) = yaml.safe_load_all(run_tool("kubectl", "kustomize", MANIFESTS))
    assert faults(built) == []
    name, _, tag = built["spec"]["containers"][0]["image"].partition(":")
    assert name == SERVER["image"]
    assert f'version = "{tag}"' in (root / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("content", ["checkpoint", "model file"])
def test_the_server_serves_what_lies_in_the_folder(tmp_path, content):
    shutil.copy(BUNDLED["dat_nano"], tmp_path / "weights.safetensors")
    if content == "model file":
        (tmp_path / "models.toml").write_text("[[models]]\ncheckpoint = 'weights.safetensors'\n")
    own = {f"DAT_SERVER__{port}_PORT": "0" for port in ("HTTP", "GRPC", "METRICS")}
    own |= {"DAT_MODEL__FOLDER": str(tmp_path), "DAT_SERVER__DRAIN_DELAY_S": "0"}
    with start_server(**environment() | own) as server:
        image = {"name": "image", "shape": [1, 1], "datatype": "BYTES"}
        image |= {"data": [base64.b64encode(JPEG).decode()]}
        path = f"/v2/models/{SERVICE['metadata']['name']}/infer"
        answer = httpx.post(server.http_url + path, json={"inputs": [image]}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert "probabilities" in {one["name"] for one in answer.json()["outputs"]}
