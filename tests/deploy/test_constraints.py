"""Whatever an install brings has one version, today and in a year."""

import re
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

PACKAGE = "dat-serve"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(package: str, extras: tuple[str, ...], seen: set[tuple[str, ...]]) -> set[str]:
    """What a package and its extras need here, and what that needs in turn."""
    for line in requires(package) or ():
        requirement = Requirement(line)
        asked = ("", *extras)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in asked):
            continue
        name = normalised(requirement.name)
        if (name, *requirement.extras) not in seen:
            seen.add((name, *requirement.extras))
            needed(name, tuple(requirement.extras), seen)
    return {name for name, *_ in seen}


@pytest.mark.parametrize("extras", [(), ("dev",)])
def test_every_package_that_an_install_needs_is_pinned(root, extras):
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {normalised(line.partition("==")[0]) for line in lines if "==" in line}
    needs = needed(PACKAGE, extras, set()) - {PACKAGE}
    assert needs <= pinned
    assert "fastapi" in needs
