"""Whatever an install brings has one version, today and in a year."""

import re

import pytest

from bench.gpu import needed


@pytest.mark.parametrize("package", ["dat-serve", "dat-serve[dev]"])
def test_every_package_that_an_install_needs_is_pinned(root, package):
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower() for name in (line.partition("==")[0] for line in lines)
    }
    needs = needed([package]) - {"dat-serve"}
    assert "fastapi" in needs
    assert needs <= pinned
