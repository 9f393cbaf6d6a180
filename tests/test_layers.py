"""Dependencies point one way: transports, core, batcher, engine, model."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.server import ROOT

LEAVES = {"service.errors", "service.settings", "service.metrics", "service.machine"}
# What a module of the service may import of this repository, beside the leaves.
ALLOWED = {
    "service/errors.py": set(),
    "service/machine.py": set(),
    "service/byte_budget.py": set(),
    "service/settings.py": set(),
    "service/metrics.py": set(),
    "service/logs.py": set(),
    "service/lifecycle.py": set(),
    "service/ports.py": set(),
    "service/memory.py": set(),
    "service/leaving.py": set(),
    "service/threads.py": set(),
    "service/batching/dispatch.py": set(),
    "service/process.py": set(),
    "service/batching/forecast.py": set(),
    "service/images/decoders.py": set(),
    "service/batching/breaker.py": set(),
    "service/batching/batcher.py": {"service.batching.breaker", "service.batching.dispatch", "service.batching.forecast"},
    "service/images/containers.py": set(),
    "service/text_file.py": set(),
    "service/images/decode.py": {"model", "service.images.containers"},
    "service/models/load.py": {"model", "service"},
    "service/engine/graphs.py": {"model"},
    "service/engine/lanes.py": {"service.memory", "service.threads"},
    "service/engine/worker.py": set(),
    "service/engine/device.py": {"service.engine", "service.memory"},
    "service/engine/classify.py": {"model"},
    "service/engine/openvino.py": {"model", "service.engine"},
    "service/engine/pipeline.py": {"service.engine"},
    "service/engine/pace.py": set(),
    "service/engine/slots.py": set(),
    "service/engine/gpu.py": {"model"},
    "service/engine/computing.py": {"service.engine"},
    "service/engine/classification.py": {"model", "service.engine"},
    "service/models/lineup.py": {"service.text_file"},
    "service/preconditions.py": set(),
    "service/healthcheck.py": set(),
    "service/tasks/points.py": {"model"},
    "service/tasks/core.py": {
        "service.batching.batcher", "service.images.containers", "service.images.decoders", "service.models.load",
    },
    "service/tasks/classification.py": {
        "model", "service.batching.batcher", "service.tasks.core", "service.images.decoders", "service.engine",
        "service.images.decode", "service.tasks.points", "service.models.load",
    },
    "service/tasks/catalogue.py": {"service.batching.batcher", "service.tasks.core"},
    "service/tasks/masks.py": set(),
    "service/engine/detection.py": {"model", "service.engine"},
    "service/tasks/detection.py": {
        "model", "service.batching.batcher", "service.tasks.core", "service.images.decoders", "service.engine",
        "service.images.decode", "service.tasks.masks", "service.tasks.points", "service.models.load",
    },
    "service/models/convert.py": {"model", "service.models.load"},
}  # fmt: skip
TRANSPORT = {
    "service.byte_budget", "service.tasks.catalogue", "service.tasks.classification", "service.tasks.core",
    "service.tasks.detection", "service.lifecycle", "service.logs", "service.tasks.masks", "service.pb",
    "service.tasks.points", "service.models.load", "service.transport",
}  # fmt: skip


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


def test_the_model_knows_nothing_of_serving():
    for path in (ROOT / "model").rglob("*.py"):
        assert all(within(name, {"model"}) for name in ours(path)), path


def test_imports_of_the_service_point_down():
    for file, allowed in ALLOWED.items():
        for name in ours(ROOT / file):
            assert within(name, allowed | LEAVES), f"{file} imports {name}"


def test_transports_see_the_core_alone():
    for path in (ROOT / "service" / "transport").glob("*.py"):
        for name in ours(path):
            assert within(name, TRANSPORT | LEAVES), f"{path} imports {name}"


def test_the_batcher_knows_no_torch():
    """Nor does anything that it imports."""
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, service.batching.batcher; print('torch' in sys.modules)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "False\n"


def test_the_environment_is_read_in_one_place():
    for path in (ROOT / "service").rglob("*.py"):
        if path.name not in ("settings.py", "process.py"):  # the latter sets what libraries read
            assert "os.environ" not in path.read_text(), path
            assert "getenv" not in path.read_text(), path
