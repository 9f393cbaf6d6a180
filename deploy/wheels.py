"""Print what the server and its tests need beside torch, for a machine without a package index.

`bench/gpu.sh prepare` fetches it.
"""

import re
import sys
from collections.abc import Collection, Iterable
from importlib.metadata import requires, version

from packaging.requirements import Requirement

# What a machine with torch has too, and would be large to carry.
THERE = {"torch", "triton", "numpy", "opencv-python-headless", "pillow", "safetensors", "tqdm"}
FOR_TESTS = ("httpx", "hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist")


def needed(packages: Iterable[str], without: Collection[str] = ()) -> set[str]:
    """The names of packages and of all that they need here.

    Args:
        packages: as requirements; all but `without` are installed.
        without: what is left out, with what it alone needs.
    """
    seen: set[str] = set()

    def add(line: str, extras: Collection[str]) -> None:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        marker = requirement.marker
        wanted = not marker or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
        # What one asks for without extras another may ask for with some.
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if wanted and name not in without and key not in seen:
            seen.add(key)
            for other in requires(name) or ():
                add(other, requirement.extras)

    for package in packages:
        add(package, ())
    return {key.partition("[")[0] for key in seen}


def wheels() -> list[str]:
    """What the server and the tests need of other packages, in the versions installed here."""
    names = needed(("dat-serve", *FOR_TESTS), without=THERE) - {"dat-serve"}
    return [f"{name}=={version(name)}" for name in sorted(names)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(wheels()) + "\n")
