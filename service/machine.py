"""What this process may use of the machine: cores and memory, as its container limits them.

A container with a limit of CPU sees all the cores of its node, and one with a limit of memory all
its memory; both are in the files of its control group (cgroups(7), versions 1 and 2).
"""

import os
import resource
from collections.abc import Iterator
from errno import ENOMEM
from math import ceil
from pathlib import Path

_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_MOST_FILES = 65536
# What libraries say, each in an error of its own, when they get no memory.
_NO_MEMORY = (
    "ALLOC_FAILED",
    "annot allocate memory",
    "can't allocate memory",
    "could not create a memory object",
    "could not create a primitive",
    "failed to map segment",
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
)


def cores(process: Path = _PROCESS, groups: Path = _GROUPS) -> int:
    """How many cores this process can keep busy, at least one.

    Those that it may run on, and no more than the time that its control group is given.

    Args:
        process: names the control groups of the process.
        groups: where the control groups are mounted.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *(ceil(share) for share in _cpu_shares(process, groups))]))


def memory_bytes(process: Path = _PROCESS, groups: Path = _GROUPS) -> int:
    """How much memory this process may have: of the machine, its control group and its limits.

    Args:
        process: names the control groups of the process.
        groups: where the control groups are mounted.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [physical, *_memory_limits(process, groups)]
    if (space := _address_space()) is not None:
        limits.append(space)
    return min(limits)


def _address_space() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def open_files() -> int:
    """How many files and connections this process may have open at a time."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files() -> None:
    """Let this process have as many files open as it may, which is rarely how it is started."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the system, torch or one of its libraries asked for memory in vain."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == ENOMEM:
        return True
    return any(sign in str(error) for sign in _NO_MEMORY)


def shortage(error: BaseException) -> str | None:
    """What this process has too little of, if that is why an error came up at its start.

    Returns:
        One line that says which limit to raise; `None` where the error is another one.
    """
    text = str(error)
    memory = (
        f"{memory_bytes() >> 20} MiB, by the memory of the machine, the control group (memory.max) "
        "and the address space (ulimit -v)"
    )
    if "can't start new thread" in text:
        soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        allowed = "any number of" if soft == resource.RLIM_INFINITY else str(soft)
        return (
            f"no more threads can be started: the user may have {allowed} processes and threads "
            f"(ulimit -u), the control group may allow fewer (pids.max), and each takes memory, of "
            f"which the process may have {memory}"
        )
    # A module that gets no memory while it is imported may say nothing at all.
    speechless = isinstance(error, SystemError) and _address_space() is not None
    if is_out_of_memory(error) or speechless:
        return f"there is not enough memory to start: the process may have {memory}"
    return None


def _cpu_shares(process: Path, groups: Path) -> Iterator[float]:
    """Cores' worth of time that each control group above the process is given."""
    for folder in _folders(process, groups, "cpu"):
        match _words(folder / "cpu.max"):
            case [quota, period] if quota != "max":
                yield int(quota) / int(period)
        match _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us"):
            case [quota], [period] if int(quota) > 0:
                yield int(quota) / int(period)


def _memory_limits(process: Path, groups: Path) -> Iterator[int]:
    for folder in _folders(process, groups, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            match _words(folder / name):
                case [limit] if limit != "max":
                    yield int(limit)


def _folders(process: Path, groups: Path, controller: str) -> Iterator[Path]:
    """The control groups of this process for a controller, up to the root, in both versions.

    The root is always among them: in a container it is often the container's own group, and the
    path that the process is given is one of the node.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:  # no control groups, or none to be seen
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = groups / controller if controllers else groups
        inside = Path(path.lstrip("/"))
        yield root
        for folder in (inside, *inside.parents):
            if folder != Path():
                yield root / folder


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:  # a file of the other version, or of no controller
        return []
