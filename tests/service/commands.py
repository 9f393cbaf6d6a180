"""The command `dat-serve` as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tests.server import ROOT


def command(*arguments: object, **settings: object) -> "subprocess.Popen[str]":
    """Start `dat-serve` with settings such as `DAT_MODEL__NAME="dat_nano"`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
    environment |= {f"DAT_SERVER__{name}_PORT": "0" for name in ("HTTP", "GRPC", "METRICS")}
    return subprocess.Popen(
        [sys.executable, "-m", "service", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {name: str(value) for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: object, **settings: object) -> "subprocess.CompletedProcess[str]":
    """Run `dat-serve` to its end."""
    process = command(*arguments, **settings)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_all(
    commands: Iterable[tuple[Iterable[object], Mapping[str, object]]],
) -> "list[subprocess.CompletedProcess[str]]":
    """Run `dat-serve` with several arguments and settings, as many at once as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as at_once:
        running = [at_once.submit(run, *given, **settings) for given, settings in commands]
    return [ended.result() for ended in running]
