import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

# The validator takes the next older schema for a version that it does not know, and says which.
KUBERNETES_VERSIONS = ["1.31", "1.37"]

BASE = Path(__file__).parents[2] / "deploy/kubernetes/base"
KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
MANIFESTS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted(BASE.glob("*.yaml"))
    if path.name != "kustomization.yaml"
}
DEPLOYMENT = MANIFESTS["deployment.yaml"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
LABELS = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
(SERVER,) = POD["containers"]
PORTS = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
SERVICES = [manifest for manifest in MANIFESTS.values() if manifest["kind"] == "Service"]


def generated_settings():
    """The variables of the generated ConfigMap."""
    (generator,) = KUSTOMIZATION["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def pod_environment():
    """All variables that the pod gives the server."""
    resources = {f"requests.{name}": q for name, q in SERVER["resources"]["requests"].items()}
    direct = {
        variable["name"]: resources[variable["valueFrom"]["resourceFieldRef"]["resource"]]
        for variable in SERVER["env"]
    }
    return generated_settings() | direct


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_fits_its_schema(name, version):
    # A kind without a schema raises too, where the command line would only warn.
    assert kubernetes_validate.validate(MANIFESTS[name], version, strict=True) == version


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_what_kustomize_builds_fits_the_schemas(run_tool, version):
    built = list(yaml.safe_load_all(run_tool("kubectl", "kustomize", BASE)))
    for manifest in built:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version

    named = {manifest["kind"]: manifest for manifest in built}
    server = named["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert named["ConfigMap"]["data"] == generated_settings()
    assert server["envFrom"][0]["configMapRef"]["name"] == named["ConfigMap"]["metadata"]["name"]
    assert re.fullmatch(r"dat-serve:\d+\.\d+\.\d+", server["image"])


def test_the_kustomization_lists_every_manifest():
    assert sorted(KUSTOMIZATION["resources"]) == sorted(MANIFESTS)


def test_the_image_has_the_version_of_the_project(root):
    (image,) = KUSTOMIZATION["images"]
    assert image["name"] == SERVER["image"]
    assert f'version = "{image["newTag"]}"' in (root / "pyproject.toml").read_text()


def test_the_server_accepts_the_environment_of_the_pod(settings_of):
    settings = settings_of(pod_environment())
    assert settings.engine.threads == int(SERVER["resources"]["requests"]["cpu"])
    # Variables such as DAT_SERVE_PORT, made from the names of Services, would be refused.
    assert POD["enableServiceLinks"] is False


def test_the_kubelet_waits_longer_than_the_drain_takes(settings_of):
    server = settings_of(pod_environment()).server
    assert server.drain_delay_s >= 5, "load balancers need seconds to notice"
    assert POD["terminationGracePeriodSeconds"] > server.drain_delay_s + server.drain_grace_s


def test_the_ports_are_those_of_the_server(settings_of):
    server = settings_of(pod_environment()).server
    assert PORTS["http"] == server.http_port
    assert PORTS["grpc"] == server.grpc_port
    assert PORTS["metrics"] == server.metrics_port


def test_the_services_together_reach_every_port():
    ports = [port for service in SERVICES for port in service["spec"]["ports"]]
    assert {port["targetPort"]: port["port"] for port in ports} == PORTS


def test_grpc_clients_see_every_pod():
    (grpc,) = (s for s in SERVICES if s["spec"]["ports"][0]["targetPort"] == "grpc")
    assert grpc["spec"]["clusterIP"] == "None"
    assert grpc["spec"]["ports"][0]["appProtocol"] == "kubernetes.io/h2c"


def test_every_selector_finds_the_pods():
    selectors = [service["spec"]["selector"] for service in SERVICES]
    selectors.append(DEPLOYMENT["spec"]["selector"]["matchLabels"])
    selectors.append(MANIFESTS["disruption-budget.yaml"]["spec"]["selector"]["matchLabels"])
    selectors += [c["labelSelector"]["matchLabels"] for c in POD["topologySpreadConstraints"]]
    for selector in selectors:
        assert selector.items() <= LABELS.items()


@pytest.mark.parametrize("probe", ["startup", "readiness", "liveness"])
def test_a_probe_asks_its_endpoint(probe):
    path = {"startup": "startup", "readiness": "ready", "liveness": "live"}[probe]
    settings = SERVER[f"{probe}Probe"]
    assert settings["httpGet"] == {"path": f"/health/{path}", "port": "http"}
    assert settings["timeoutSeconds"] >= 5, "the default of 1 s kills busy pods"


def test_prometheus_is_told_the_metrics_port():
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORTS["metrics"])
    assert annotations["prometheus.io/path"] == "/metrics"


def test_the_pod_has_no_more_rights_than_it_needs():
    assert POD["automountServiceAccountToken"] is False
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert SERVER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_one_writable_place_is_a_bounded_tmp():
    (mount,) = SERVER["volumeMounts"]
    (volume,) = POD["volumes"]
    assert mount == {"name": volume["name"], "mountPath": "/tmp"}
    assert volume["emptyDir"]["sizeLimit"]


def test_memory_is_bounded_and_cpu_is_not():
    assert set(SERVER["resources"]["limits"]) == {"memory"}
    assert SERVER["resources"]["requests"]["memory"] == SERVER["resources"]["limits"]["memory"]
