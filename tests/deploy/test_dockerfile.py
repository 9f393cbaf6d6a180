import json
import re

import pytest
import yaml


@pytest.fixture(scope="module")
def instructions(root):
    """Each instruction with its arguments, in order; continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (root / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def final(instructions):
    """The instructions of the last stage, by name; of a repeated one the last."""
    start = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    return dict(instructions[start:])


def test_every_stage_builds_on_the_given_base(instructions):
    (name, base) = instructions[0]
    assert name == "ARG"
    assert re.fullmatch(r"BASE_IMAGE=python:3\.\d+-\S+", base), "a tag, and no registry's host"
    stages = [arguments for name, arguments in instructions if name == "FROM"]
    assert len(stages) > 1
    assert all(stage.split()[0] == "${BASE_IMAGE}" for stage in stages)


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


def test_dependencies_are_installed_before_the_source_arrives(instructions):
    install = next(i for i, (name, text) in enumerate(instructions) if "pip install" in text)
    assert "PIP_CONSTRAINT=constraints.txt" in instructions[install][1]
    copied = [text for name, text in instructions[:install] if name == "COPY"]
    assert copied == ["pyproject.toml constraints.txt ./"]


def test_only_what_the_server_needs_enters_the_build(root):
    lines = (root / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    assert admitted == {"LICENSE", "constraints.txt", "demo", "model", "pyproject.toml", "service"}
