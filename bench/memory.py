"""Memory of a process, and functions that run in a process of their own."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest import mock

from service.memory import give_back

P = ParamSpec("P")
T = TypeVar("T")

# Whatever is larger comes from the system and returns to it: what is resident is what is in use.
IN_USE_ALONE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
# What is free stays in the process, blocks of hundreds of megabytes included.
ALL_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def resident(pid: int | None = None) -> int:
    """Bytes of a process in memory now; `None` means this one."""
    return _status("VmRSS", pid)


def reset_peak(pid: int | None = None) -> None:
    """Let `peak` begin anew."""
    Path(f"/proc/{pid or 'self'}/clear_refs").write_text("5")


def peak(pid: int | None = None) -> int:
    """Most bytes of a process in memory since it began, or since `reset_peak`."""
    return _status("VmHWM", pid)


def in_use() -> int:
    """Bytes of this process after all that is free was given back."""
    give_back()
    return resident()


def most_taken(call: Callable[[], object]) -> int:
    """Most memory that a call takes beside what the first one left, bytes."""
    call()
    before = in_use()
    reset_peak()
    call()
    return peak() - before


def _status(field: str, pid: int | None) -> int:
    lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def own_process(environment: Mapping[str, str]) -> ProcessPoolExecutor:
    """A fresh process for one thing at a time, with some variables of its environment."""
    processes = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with mock.patch.dict(os.environ, environment):
        processes.submit(int).result()  # it begins with its first work
    return processes


def in_own_process(
    environment: Mapping[str, str], function: Callable[P, T], *args: P.args, **options: P.kwargs
) -> T:
    """Call a function of a module in a process of its own."""
    with own_process(environment) as processes:
        return processes.submit(function, *args, **options).result()
