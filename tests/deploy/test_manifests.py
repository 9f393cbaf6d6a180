import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.mounts import runs_code

# The validator takes the next older schema for a version that it does not know, and says which.
KUBERNETES_VERSIONS = ["1.31", "1.37"]

BASE = Path(__file__).parents[2] / "deploy/kubernetes/base"
CUDA = BASE.parent / "cuda"
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
@pytest.mark.parametrize("folder", [BASE, CUDA], ids=lambda folder: folder.name)
def test_what_kustomize_builds_fits_the_schemas(run_tool, folder, version):
    built = list(yaml.safe_load_all(run_tool("kubectl", "kustomize", folder)))
    for manifest in built:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version

    named = {manifest["kind"]: manifest for manifest in built}
    server = named["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert named["ConfigMap"]["data"].items() >= generated_settings().items()
    assert server["envFrom"][0]["configMapRef"]["name"] == named["ConfigMap"]["metadata"]["name"]
    assert re.fullmatch(r"dat-serve:\d+\.\d+\.\d+(-cuda)?", server["image"])


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


@pytest.fixture(scope="module")
def on_gpus(run_tool):
    """What is built for nodes with GPUs, by kind; of the Services the last."""
    built = yaml.safe_load_all(run_tool("kubectl", "kustomize", CUDA))
    return {manifest["kind"]: manifest for manifest in built}


@pytest.fixture
def gpu_pod(on_gpus):
    return on_gpus["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def gpu_container(gpu_pod):
    (container,) = gpu_pod["containers"]
    return container


def test_a_gpu_pod_gets_one_gpu_and_must_use_it(on_gpus, gpu_container, settings_of):
    assert gpu_container["resources"]["limits"]["nvidia.com/gpu"] == 1
    # Not auto, which would go on without a word on the CPU.
    assert settings_of(on_gpus["ConfigMap"]["data"]).engine.device == "cuda"


def test_a_gpu_pod_runs_the_image_that_compose_builds_for_cuda(root, gpu_container):
    compose = yaml.safe_load((root / "docker-compose.yml").read_text())
    assert gpu_container["image"] == compose["services"]["server-gpu"]["image"]


def test_a_gpu_pod_may_run_where_only_gpu_pods_may(gpu_pod):
    (toleration,) = gpu_pod["tolerations"]
    assert toleration == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def test_a_rollout_needs_no_spare_gpu(on_gpus):
    rollout = on_gpus["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    budget = on_gpus["PodDisruptionBudget"]["spec"]
    assert rollout == {"maxSurge": 0, "maxUnavailable": budget["maxUnavailable"]}
    assert on_gpus["Deployment"]["spec"]["replicas"] > rollout["maxUnavailable"]


def test_a_gpu_pod_may_execute_the_kernels_that_it_compiles(gpu_pod, gpu_container, code_folders):
    # An emptyDir has no option noexec.
    writable = {volume["name"] for volume in gpu_pod["volumes"] if "emptyDir" in volume}
    mounts = {
        Path(mount["mountPath"]): mount["name"] in writable and not mount.get("readOnly", False)
        for mount in gpu_container["volumeMounts"]
    }
    for folder in code_folders:
        assert runs_code(folder, mounts), folder


def test_a_gpu_pod_is_otherwise_bounded_as_any(gpu_pod, gpu_container):
    resources = gpu_container["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" not in resources["limits"]
    assert gpu_container["securityContext"] == SERVER["securityContext"]
    assert gpu_pod["securityContext"] == POD["securityContext"]
    assert all(volume["emptyDir"]["sizeLimit"] for volume in gpu_pod["volumes"])
