"""What else is in the environment: variables of the prefix that set nothing, and blanks."""

import difflib
import os
import re
from collections.abc import Collection
from typing import Any

PREFIX = "DAT_"
_FEW = 3  # faults that are shown at a time

# Variables that Kubernetes sets in every container for each Service of the namespace, such as one
# that is called `dat-serve`.
_SERVICE = re.compile(
    rf"{PREFIX}[A-Z0-9]+(_[A-Z0-9]+)*?"
    r"_(SERVICE_(HOST|PORT(_[A-Z0-9]+)*)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(rf"{PREFIX}([A-Z0-9]+_)*PORT=(tcp|udp|sctp)://.*")


def refuse_unknown(known: Collection[str]) -> None:
    """Refuse variables of the prefix that set nothing, which pydantic-settings ignores.

    Args:
        known: names of those that set something.

    Raises:
        ValueError: with what to do about each.
    """
    unknown = sorted(
        name
        for name in os.environ
        if name.upper().startswith(PREFIX)
        and name.upper() not in known
        and not _of_a_service(name, os.environ[name])
    )
    if unknown:
        raise ValueError("; ".join(_hint(name, known) for name in unknown[:_FEW]))


def written(group: Any) -> Any:
    """The values of a group as they were meant: without white space around, empty ones not set."""
    if not isinstance(group, dict):
        return group
    stripped = {name: v.strip() if isinstance(v, str) else v for name, v in group.items()}
    return {name: value for name, value in stripped.items() if value != ""}


def _of_a_service(name: str, value: str) -> bool:
    return bool(_SERVICE.fullmatch(name) or _SERVICE_URL.fullmatch(f"{name}={value}"))


def _hint(name: str, known: Collection[str]) -> str:
    """What to do about a variable that sets nothing."""
    group = [variable for variable in known if variable.startswith(f"{name.upper()}__")]
    near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.75)
    if group:
        hint = f"it is the group of {', '.join(group)}"
    elif near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = "`dat-serve settings` prints all there are"
    return f"unknown setting {name:.100}; {hint}"
