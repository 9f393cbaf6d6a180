"""No time limit depends on the clock of the wall, which may jump."""

import ast
from pathlib import Path

from tests.server import ROOT

OF_THE_WALL = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
# The stamps of the log, and whether a certificate is still good, are of that time.
MAY_ASK = {Path("logs.py"), Path("metrics/requests.py"), Path("security/certificates.py")}


def asks_the_wall(tree: ast.AST) -> set[str]:
    """The calls that do: of the module `time`, or of `datetime`; loop time is another one."""
    return {
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in OF_THE_WALL
        and ast.unparse(node.func.value).split(".")[-1] in ("time", "datetime", "date")
    }


def imports_the_wall(tree: ast.AST) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "time"
        and {name.name for name in node.names} & OF_THE_WALL
        for node in ast.walk(tree)
    )


def test_only_stamps_are_of_the_time_of_day():
    asking = set()
    for path in (ROOT / "service").rglob("*.py"):
        tree = ast.parse(path.read_text())
        if asks_the_wall(tree) or imports_the_wall(tree):
            asking.add(path.relative_to(ROOT / "service"))
    assert Path("logs.py") in asking  # or nothing would be found
    assert asking <= MAY_ASK
