"""The command `dat-serve` as a user runs it."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.server import ROOT

TIMEOUT_S = 100

# Importing what is not ours takes most of the time of a command that is refused.
_IMPORTED = ("torch", "cv2", "fastapi", "uvicorn", "pydantic_settings", "structlog")
_forks = get_context("forkserver")
_forks.set_forkserver_preload(list(_IMPORTED))


def command(*arguments: object, **settings: object) -> "subprocess.Popen[str]":
    """Start `dat-serve` with settings such as `DAT_MODEL__NAME="dat_nano"`."""
    return subprocess.Popen(
        [sys.executable, "-m", "service", *map(str, arguments)],
        cwd=ROOT,
        env=_environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: object, **settings: object) -> "subprocess.CompletedProcess[str]":
    """Run `dat-serve` to its end."""
    process = command(*arguments, **settings)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_all(
    commands: Iterable[tuple[Iterable[object], Mapping[str, object]]],
) -> "list[subprocess.CompletedProcess[str]]":
    """Run `dat-serve` with several arguments and settings, as many at once as there are cores.

    Each in a process of its own, forked from one that has only imported libraries.
    """
    with ThreadPoolExecutor(os.cpu_count()) as at_once:
        running = [at_once.submit(_run_forked, *given) for given in commands]
    return [ended.result() for ended in running]


def _run_forked(
    arguments: Iterable[object], settings: Mapping[str, object]
) -> "subprocess.CompletedProcess[str]":
    with TemporaryDirectory() as folder:
        out, err, code = (Path(folder) / name for name in ("out", "err", "code"))
        given = list(map(str, arguments))
        process = _forks.Process(target=_main, args=(given, _environment(settings), out, err, code))
        process.start()
        process.join(TIMEOUT_S)
        assert process.exitcode is not None, f"{given} did not end"
        # Its own word, if it gave one: what the server of the forks says of many at a time is 255
        # now and then.
        ended = int(code.read_text("utf-8")) if code.exists() else process.exitcode
        return subprocess.CompletedProcess(
            given, ended, out.read_text("utf-8"), err.read_text("utf-8")
        )


def _main(
    arguments: list[str], environment: Mapping[str, str], out: Path, err: Path, code: Path
) -> None:
    """What `python -m service` does, with its output and its exit code in files."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv[1:] = arguments
    try:
        runpy.run_module("service", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, int):
            code.write_text(str(ended.code), "utf-8")
        raise


def _environment(settings: Mapping[str, object]) -> dict[str, str]:
    """This process's, with no settings but these and free ports."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
    ports = {f"DAT_SERVER__{name}_PORT": "0" for name in ("HTTP", "GRPC", "METRICS")}
    return inherited | ports | {name: str(value) for name, value in settings.items()}
