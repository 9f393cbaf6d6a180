"""The settings as a table: what `dat-serve settings` prints and `docs/settings.md` holds."""

import sys
from pathlib import Path

from service.settings.settings import variables

_TABLE_START, _TABLE_END = "<!-- settings -->", "<!-- /settings -->"


def table() -> str:
    """The settings as a Markdown table for `docs/settings.md`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for variable, (group, field) in variables().items():
        info = group.model_fields[field]
        default = info.default if info.default not in (None, "", ()) else ""
        rows.append(
            f"| `{variable}` | {f'`{default}`' if default != '' else ''} | {info.description} |"
        )
    return "\n".join(rows)


def write_table(path: Path) -> None:
    """Replace the table between the markers of a Markdown file."""
    before, rest = path.read_text("utf-8").split(_TABLE_START)
    _, after = rest.split(_TABLE_END)
    path.write_text(f"{before}{_TABLE_START}\n{table()}\n{_TABLE_END}{after}", "utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
