"""What a container allows, read from control groups that look like those of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.machine import cores, memory_bytes
from tests.server import ROOT

CORES = len(os.sched_getaffinity(0))


def group(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


@pytest.fixture
def process(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("150000 100000", min(2, CORES)),
        ("max 100000", CORES),
    ],
)
def test_cores_are_the_time_that_a_container_is_given(tmp_path, process, limit, expected):
    process.write_text("0::/\n")
    group(tmp_path / "groups", cpu__max=limit)
    assert cores(process, tmp_path / "groups") == expected


def test_the_tightest_group_above_counts(tmp_path, process):
    process.write_text("0::/pod/container\n")
    group(tmp_path / "groups" / "pod", cpu__max="100000 100000", memory__max="1000000000")
    group(tmp_path / "groups" / "pod" / "container", cpu__max="max 100000", memory__max="max")
    assert cores(process, tmp_path / "groups") == 1
    assert memory_bytes(process, tmp_path / "groups") == 1_000_000_000


def test_version_1_has_a_folder_for_each_controller(tmp_path, process):
    process.write_text("4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n0::/\n")
    # In the container only the mount's root is there, not the path of the node.
    group(tmp_path / "groups" / "cpu", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    group(tmp_path / "groups" / "memory", memory__limit_in_bytes="500000000")
    assert cores(process, tmp_path / "groups") == 1
    assert memory_bytes(process, tmp_path / "groups") == 500_000_000


def test_without_limits_the_machine_counts(tmp_path, process):
    assert cores(process, tmp_path) == CORES
    process.write_text("2:cpu:/\n4:memory:/\n")
    group(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096))
    assert cores(process, tmp_path) == CORES
    assert memory_bytes(process, tmp_path) == memory_bytes(process, tmp_path / "none")


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        pytest.param("ulimit -u 16", "more threads", marks=pytest.mark.slow),
        ("ulimit -v 700000", "enough memory"),
    ],
)
def test_a_machine_that_is_too_small_is_named_in_one_line_at_the_start(limit, says):
    start = ["bash", "-c", f"{limit}; exec {sys.executable} -m service"]
    if os.getuid() == 0:  # nobody counts the threads of that user
        kept = "-all,+dac_override"  # to read files that are its own
        other = ("--reuid=54321", "--clear-groups", f"--inh-caps={kept}", f"--ambient-caps={kept}")
        start = ["setpriv", *other, *start]
    ended = subprocess.run(
        start,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DAT_MODEL__NAME": "dat_nano"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 1
    *_, line = ended.stderr.splitlines()
    assert line.startswith("dat-serve: ")
    assert says in line
    assert "Traceback" not in ended.stderr


def test_a_process_may_open_as_many_files_as_its_hard_limit_says():
    program = """
import resource
from service.machine import open_files, raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
raise_open_files()
print(open_files())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "128\n"
