import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

DEVICES = ["cpu", "cuda"]


@pytest.fixture(scope="module", params=DEVICES)
def final(request, dockerfile):
    """The instructions that make an image, by name; of a repeated one the last."""
    return dict(dockerfile.image(request.param))


def pins(path):
    """The requirements of a file of constraints, by name."""
    lines = path.read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement.specifier for requirement in requirements}


def installed(instructions):
    """Debian's packages that these instructions install."""
    commands = [
        shlex.split(command)
        for name, text in instructions
        if name == "RUN"
        for command in re.split("&&|;|then", text)
        if "apt-get install" in command
    ]
    return {w for words in commands for w in words[2:] if not w.startswith("-")}


def test_every_stage_builds_on_the_given_base(dockerfile):
    assert re.fullmatch(r"python:3\.\d+-\S+", dockerfile.arguments["BASE_IMAGE"]), (
        "a tag, and no registry's host"
    )
    assert len(dockerfile.stages) > 1
    for device in DEVICES:
        assert dockerfile.image(device)
    assert set(dockerfile.bases[:-1]) == {"${BASE_IMAGE}"}


def test_the_image_is_for_the_cpu_unless_another_is_asked_for(dockerfile):
    assert dockerfile.arguments["DEVICE"] == "cpu"


def test_only_the_image_for_cuda_has_a_compiler(dockerfile):
    assert installed(dockerfile.image("cpu")) == set()
    assert installed(dockerfile.image("cuda")) >= {"gcc", "libc6-dev"}


def test_the_driver_is_mounted_for_computing_and_no_gpu_is_taken_unasked(dockerfile):
    environment = dockerfile.environment("cuda")
    assert "compute" in environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")
    # On a cluster it would give a pod all GPUs of its node.
    assert "NVIDIA_VISIBLE_DEVICES" not in environment


def test_the_server_is_process_1_and_gets_the_stop_signal(final):
    assert json.loads(final["CMD"]) == ["dat-serve"]
    assert "ENTRYPOINT" not in final
    assert final["STOPSIGNAL"] == "SIGTERM"


def test_the_server_is_not_root(root, final):
    user, _, group = final["USER"].partition(":")
    deployment = yaml.safe_load((root / "deploy/kubernetes/base/deployment.yaml").read_text())
    security = deployment["spec"]["template"]["spec"]["securityContext"]
    # By number: Kubernetes cannot tell that a name is not root's.
    assert int(user) == security["runAsUser"] != 0
    assert int(group) == security["runAsGroup"] != 0


def test_the_health_check_needs_no_shell(final):
    command = final["HEALTHCHECK"].partition("CMD ")[2]
    assert json.loads(command) == ["dat-serve", "healthcheck"]


def test_the_exposed_ports_are_those_of_the_server(final, settings_of):
    server = settings_of({}).server
    assert [int(port) for port in final["EXPOSE"].split()] == [
        server.http_port,
        server.grpc_port,
        server.metrics_port,
    ]


@pytest.fixture
def install(dockerfile, tmp_path):
    """Run what the builder installs with, on a pip that only notes what it was told."""
    (command,) = (
        text.partition("pip_conf,target=/etc/pip.conf ")[2]
        for name, text in dockerfile.stages["builder"]
        if "pip install" in text
    )
    venv = tmp_path / "venv"
    touched = set(re.findall(r"(?<![\w.*])/\w+/\w+", command))
    assert touched == {"/opt/venv"}, "a test must not touch the machine"
    (venv / "bin").mkdir(parents=True)
    noted = tmp_path / "noted"
    scripts = {
        "pip": f'#!/bin/sh\necho "$PIP_CONSTRAINT" "$@" >> {noted}\n',
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }
    for name, text in scripts.items():
        (venv / "bin" / name).write_text(text)
        (venv / "bin" / name).chmod(0o755)

    def run(cuda_of_torch=None, **arguments):
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(f"cuda = {cuda_of_torch!r}")
        (tmp_path / "torch/__init__.py").write_text("from torch import version")
        done = subprocess.run(
            ["sh", "-c", command.replace("/opt/venv", str(venv))],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), **arguments},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return noted.read_text().splitlines()[0]

    return run


def test_dependencies_are_installed_before_the_source_arrives(dockerfile, install):
    copied = [text for name, text in dockerfile.stages["builder"] if name == "COPY"]
    assert copied == ["pyproject.toml constraints*.txt ./"]
    assert install(DEVICE="cpu") == "constraints.txt install --editable ."


@pytest.mark.parametrize("constraints", ["constraints-cuda.txt", "constraints-cu126.txt"])
def test_the_image_for_cuda_gets_the_build_of_torch_that_is_asked_for(install, constraints):
    told = install("12.6", DEVICE="cuda", CUDA_CONSTRAINTS=constraints)
    assert told == f"constraints.txt install --editable . --constraint {constraints}"


def test_the_image_for_cuda_is_not_built_with_a_torch_for_the_cpu(install):
    with pytest.raises(AssertionError, match="not for CUDA"):
        install(None, DEVICE="cuda", CUDA_CONSTRAINTS="constraints-cuda.txt")


def test_the_build_of_torch_for_cuda_is_of_the_same_release(root, dockerfile):
    (default,) = (
        text.partition("=")[2]
        for name, text in dockerfile.stages["builder"]
        if name == "ARG" and text.startswith("CUDA_CONSTRAINTS=")
    )
    common, cuda = pins(root / "constraints.txt"), pins(root / default)
    (release,) = (pin.version for pin in common["torch"])
    assert release in cuda["torch"]
    assert f"{release}+cpu" in common["torch"]
    assert f"{release}+cpu" not in cuda["torch"]
    assert cuda.keys() & common.keys() == {"torch"}
    assert all(pin.operator in {"==", "==="} for pinned in cuda.values() for pin in pinned)


def test_only_what_the_server_needs_enters_the_build(root):
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    assert admitted == {"LICENSE", "constraints*.txt", "demo", "model", "pyproject.toml", "service"}
