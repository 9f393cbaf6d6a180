"""Figures as lines of JSON on standard output, some with a bound that they should keep."""

import json
from typing import Any


def note(**values: object) -> None:
    """Print one figure, at once."""
    print(json.dumps(values), flush=True)


def find(
    model: str,
    what: str,
    figure: float,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> None:
    """Print a figure that has a bound, or is of interest without one."""
    bounds = {"at_most": at_most, "at_least": at_least}
    note(
        model=model,
        what=what,
        figure=float(figure),
        **{key: bound for key, bound in bounds.items() if bound is not None},
    )


def verdict(row: dict[str, Any]) -> str:
    """Whether a figure keeps its bounds: `met`, `missed`, or nothing where it has none."""
    if not {"at_most", "at_least"} & row.keys():
        return ""
    # A figure that is not a number misses them.
    kept = row.get("at_least", -float("inf")) <= row["figure"] <= row.get("at_most", float("inf"))
    return "met" if kept else "missed"


def bound(row: dict[str, Any]) -> str:
    """The bounds of a figure, in words."""
    words = {"at_most": "at most", "at_least": "at least"}
    return ", ".join(f"{word} {row[key]:g}" for key, word in words.items() if key in row)
