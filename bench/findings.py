"""Figures as lines of JSON on standard output, some with a bound that they should keep."""

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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


class Cases:
    """Cases of which none stops those after it."""

    def __init__(self) -> None:
        self._failed: list[str] = []

    @contextmanager
    def case(self, model: str, title: str) -> Iterator[None]:
        """One case, whose failure is printed and goes no further."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:
            self._failed.append(f"{model}, {title}")
            traceback.print_exc()
            note(model=model, failed=title, error=f"{type(error).__name__}: {str(error)[:300]}")
        print(f"{model}, {title}: {time.perf_counter() - began:.1f} s", flush=True)

    def end(self) -> None:
        """End the process with 1 if a case failed."""
        if self._failed:
            sys.exit(f"failed: {'; '.join(self._failed)}")
