"""The command `dat-serve`."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from urllib.request import urlopen

import uvloop
from pydantic import ValidationError

from service import logs, settings

_HEALTHCHECK_TIMEOUT_S = 3.0


def main() -> None:
    """Run the command line; exits with 0 when all went well."""
    commands: dict[str, tuple[str, Callable[[], int]]] = {
        "serve": ("start the server (the default)", _serve),
        "healthcheck": ("exit with 0 if the server on this machine is ready", _healthcheck),
        "settings": ("print the table of settings", _settings),
    }
    parser = argparse.ArgumentParser(
        prog="dat-serve",
        description="Serve DAT vision models. Settings come from the environment (DAT_...).",
    )
    subparsers = parser.add_subparsers(dest="command")
    for name, (summary, _) in commands.items():
        subparsers.add_parser(name, help=summary)
    command = parser.parse_args().command or "serve"
    sys.exit(commands[command][1]())


def _serve() -> int:
    try:
        chosen = settings.Settings()
    except ValidationError as error:
        return _fail(*(_setting_fault(fault) for fault in error.errors(include_url=False)))
    logs.configure(chosen.log)
    # Loading torch takes seconds; a wrong setting should not wait for it.
    from model.checkpoint import CheckpointError  # noqa: PLC0415
    from service.engine.engine import DeviceUnavailable  # noqa: PLC0415
    from service.replica import StartupError, serve  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(chosen))
        except (CheckpointError, DeviceUnavailable, StartupError) as error:
            return _fail(str(error))
    return 0


def _setting_fault(fault: object) -> str:
    assert isinstance(fault, dict)
    variable = settings.PREFIX + "__".join(map(str, fault["loc"])).upper()
    message = fault["msg"].removeprefix("Value error, ")
    return f"{variable}: {message}" if fault["loc"] else message


def _fail(*messages: str) -> int:
    for message in messages:
        print(f"dat-serve: {message}", file=sys.stderr)  # noqa: T201
    return 1


def _healthcheck() -> int:
    server = settings.Settings().server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host  # noqa: S104
    try:
        with urlopen(
            f"http://{host}:{server.http_port}/health/ready", timeout=_HEALTHCHECK_TIMEOUT_S
        ):
            return 0
    except OSError as error:
        return _fail(str(error))


def _settings() -> int:
    print(settings.table())  # noqa: T201
    return 0
