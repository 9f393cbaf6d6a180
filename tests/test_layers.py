"""Dependencies point one way: transports, tasks, batching, engine, model."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.server import ROOT

# Anybody may know them; they know each other alone.
LEAVES = {
    "service.errors", "service.settings", "service.metrics", "service.machine", "service.cpus",
    "service.logs",
    "service.threads", "service.text_file", "service.byte_budget", "service.lifecycle",
    "service.ports", "service.command_errors", "service.priority", "service.share",
}  # fmt: skip
# The model without torch: what follows from a configuration, and pixels.
TORCH_FREE = {
    "model.config", "model.geometry", "model.transforms", "model.swin_config",
    "model.detection.config", "model.detection.masks", "model.detection.transforms",
    "model.segmentation.config", "model.segmentation.transforms",
}  # fmt: skip
# What both wires have in common, above all words.
WORDS = {
    "service.transport.request_id", "service.transport.priority", "service.transport.base64_text",
    "service.transport.attention_text", "service.transport.unread",
}  # fmt: skip
# What each room may know beside itself and the leaves, from the top of the house down.
ROOMS = {
    "service.transport.request_id": set(), "service.transport.priority": set(),
    "service.transport.base64_text": set(), "service.transport.unread": set(),
    "service.transport.attention_text": {"service.tasks"},
    "service.transport.oip": WORDS | {
        "service.tasks", "service.models.card", "service.images.raw",
    },
    "service.transport.http": WORDS | {
        "service.transport.oip", "service.tasks", "service.models.card", "service.security",
        "service.playground",
    },
    "service.transport.rpc": WORDS | {
        "service.transport.oip", "service.tasks", "service.models.card", "service.pb",
        "service.security",
    },
    "service.tasks": TORCH_FREE | {
        "service.batching", "service.images", "service.engine.items", "service.models.card",
        "service.pictures",
    },
    "service.images": TORCH_FREE,
    "service.pictures": set(),
    "service.batching": set(),
    "service.models": {"model"},
    "service.engine": {"model", "service.memory"},
    "service.leaving": set(),
    "service.security": set(),
    "service.playground": set(),
    "service.preconditions": {"service.security"},
    "service.healthcheck": {"service.process"},
    "service.process": {"service.memory", "model.kernels"},
    "service.memory": set(),
}  # fmt: skip
# Those who put the house together, and see all of it.
ON_TOP = {
    "service", "service.__main__", "service.cli", "service.replica", "service.servers",
    "service.local_models", "service.reloading",
    "service.open_model", "service.open_core", "service.computed_tasks", "service.served_tasks",
    "service.processes", "service.http_server", "service.event_loop", "service.evaluation",
    "service.pb", "service.transport",
}  # fmt: skip
WITHOUT_TORCH = (
    "service.transport.http.app", "service.transport.rpc.server", "service.tasks.classification",
    "service.tasks.detection", "service.tasks.segmentation", "service.images.decode",
    "service.batching.batcher",
    "service.models.card", "service.open_core", "service.servers",
    "service.transport.oip.inference",
)  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for path in (ROOT / "service").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if within(name, {"model", "service", "demo"})]


def room_of(name: str) -> str | None:
    return next((room for room in ROOMS if within(name, {room})), None)


def test_the_model_knows_nothing_of_serving():
    for path in (ROOT / "model").rglob("*.py"):
        assert all(within(name, {"model"}) for name in ours(path)), path


def test_every_module_has_a_room():
    for name, path in modules():
        homes = [name in ON_TOP or within(name, ON_TOP - {"service", "service.transport"}),
                 within(name, LEAVES), room_of(name) is not None]  # fmt: skip
        empty_package = path.name == "__init__.py"
        assert any(homes) or empty_package, f"{name} is in no room"


def test_imports_point_down():
    for name, path in modules():
        room = room_of(name)
        allowed = LEAVES if room is None else LEAVES | ROOMS[room] | {room}
        if within(name, LEAVES) or room is not None:
            for imported in ours(path):
                assert within(imported, allowed), f"{name} imports {imported}"


def test_http_connections_know_nothing_of_what_is_asked_over_them():
    """Each of their files is known by those alone that need it: none is imported in a circle."""
    room = "service.transport.http.connections"
    below = {"error_forms", "probes", "schema"}
    order = [
        "head", "deadlines", "reading", "refusals", "application", "answers", "held",
        "connection", "over_tls",
    ]  # fmt: skip
    files = {name: path for name, path in modules() if within(name, {room})}
    assert set(files) == {room, *(f"{room}.{name}" for name in order)}
    for index, name in enumerate(order):
        known = {f"{room}.{other}" for other in order[:index]}
        known |= {f"service.transport.http.{other}" for other in below}
        for imported in ours(files[f"{room}.{name}"]):
            if within(imported, {"service.transport.http"}):
                assert within(imported, known), f"{name} imports {imported}"


def test_nobody_below_a_task_knows_which_tasks_there_are():
    """Only a task's own files and the record of all tasks name one."""
    own = ("classif", "detect", "segment", "masks")
    shared = [
        path
        for name, path in modules()
        if within(name, {"service.batching", "service.transport", "service.tasks"})
        and not any(part in path.name for part in own)
    ]
    assert shared
    for path in shared:
        for imported in ours(path):
            assert not any(part in imported for part in own), f"{path} imports {imported}"


def test_what_stands_before_the_device_does_without_torch():
    """So a front end can be a process of its own, and a small one; prints what it weighs."""
    code = (
        f"import json, sys, {', '.join(WITHOUT_TORCH)}\n"
        "pages = int(open('/proc/self/statm').read().split()[1])\n"
        "print(json.dumps(['torch' in sys.modules, pages]))"
    )
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    torch_is_there, pages = json.loads(seen.stdout)
    mebibytes = pages * resource.getpagesize() / 2**20
    print(f"a process with all but the engine: {mebibytes:.0f} MiB")  # noqa: T201
    assert not torch_is_there


def test_settings_are_read_before_anything_that_is_slow_to_load():
    code = "import sys, service.settings.table; print(*sys.modules)"
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "grpc", "prometheus_client", "uvicorn"} & set(seen.stdout.split())


def test_the_environment_is_read_in_one_place():
    for path in (ROOT / "service").rglob("*.py"):
        if path.name not in ("environment.py", "process.py"):  # the latter sets what libraries read
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path
