"""Tables in Markdown, from the rows of result files."""

import string
from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]

# Cells that many tables have.
RATIO = "**{ratio:.2f}** ({ratio_range[0]:.2f}-{ratio_range[1]:.2f})"
LATENCY = "{p50_ms:.0f} / {p90_ms:.0f} / {p99_ms:.0f}"


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """A table in Markdown.

    Args:
        columns: from titles to cells, in the language of `str.format` with the fields of a row.
            It has three words more: `/1e6 .1f` divides before it formats, `rate` has a decimal
            more for small numbers, and `x` is for the sides of a map or an image.
        rows: in order.
    """
    cells = _Cells()
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([cells.vformat(cell, (), row) for cell in columns.values()] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class _Cells(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        if format_spec == "x":
            return "x".join(map(str, value))
        if format_spec == "rate":
            format_spec = ".1f" if value >= 10 else ".2f"
        if format_spec.startswith("/"):
            divisor, _, format_spec = format_spec[1:].partition(" ")
            value /= float(divisor)
        return super().format_field(value, format_spec)


def in_short(counts: Mapping[str, int]) -> str:
    """How often each status was answered, in words."""
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
