"""The class of a request in HTTP headers and gRPC metadata."""

from typing import get_args

from service.errors import InvalidOption, quoted
from service.priority import Priority

# Not `Priority` of RFC 9218: browsers send that on their own, and mean the order of their page.
HEADER = "x-priority"
_KNOWN: dict[str, Priority] = {priority: priority for priority in get_args(Priority)}


def read(given: str | None) -> Priority:
    """The class that a header names; the upper one where there is none.

    Raises:
        InvalidOption: there is no such class.
    """
    if given is None:
        return "high"
    if (priority := _KNOWN.get(given.strip().lower())) is None:
        raise InvalidOption(f"{HEADER} is one of {', '.join(_KNOWN)}, not {quoted(given)}")
    return priority


def lower(one: Priority, other: Priority) -> Priority:
    """The class of a request that names two: whoever stands between can make it wait."""
    return "low" if "low" in (one, other) else "high"
