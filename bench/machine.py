"""What a figure needs beside it: the machine, the versions, the commit and the command."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

# Where result files go.
RESULTS = Path(os.environ.get("BENCH_RESULTS", Path(__file__).parent / "results"))


def describe(module: str, device: str, threads: int | None = None) -> dict[str, str | int]:
    """Describe this run of `python -m <module>`; fields are plain strings and numbers.

    Args:
        module: of this run.
        device: `cpu` or `cuda`.
        threads: that computed; `None` means those of the calling thread.
    """
    import torch  # noqa: PLC0415  # load generators need none

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{named['model name']} (family {named['cpu family']}, model {named['model']})"


def _commit() -> str:
    if carried := os.environ.get("BENCH_COMMIT"):
        return carried  # a tree that was carried elsewhere has no history
    commit = _git("describe", "--always", "--abbrev=12", "--exclude=*").stdout.strip()
    if not commit:
        return "unknown"  # an unpacked archive has no history
    # What the benchmark before this one wrote changes nothing that is measured.
    changed = _git("diff", "--quiet", "HEAD", "--", ".", ":!bench/results").returncode
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["git", *arguments], check=False, capture_output=True, text=True)
