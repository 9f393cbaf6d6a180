"""Whatever an install brings has one version, today and in a year."""

import re

import pytest

from deploy.wheels import needed, wheels


@pytest.mark.parametrize("package", ["dat-serve", "dat-serve[dev]"])
def test_every_package_that_an_install_needs_is_pinned(root, package):
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower() for name in (line.partition("==")[0] for line in lines)
    }
    needs = needed([package]) - {"dat-serve"}
    assert "fastapi" in needs
    assert needs <= pinned


def test_wheels_are_all_that_the_server_needs_but_what_comes_with_torch() -> None:
    names = {wheel.partition("==")[0] for wheel in wheels()}
    everything = needed(["dat-serve"])
    assert {"fastapi", "starlette", "opentelemetry-api", "pytest", "pytest-asyncio"} <= names
    assert everything - names >= {"dat-serve", "torch", "numpy", "sympy"}
    assert "openvino" not in names | everything
