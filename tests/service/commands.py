"""The command `dat-serve` as a user runs it."""

import os
import subprocess
import sys

from tests.server import ROOT


def command(*arguments: object, **settings: object) -> "subprocess.Popen[str]":
    """Start `dat-serve` with settings such as `DAT_MODEL__NAME="dat_nano"`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
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
