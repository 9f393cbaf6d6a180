"""The command `dat-serve`."""

import argparse
import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from urllib.request import urlopen

import uvloop
from pydantic import ValidationError

from service import logs, machine, settings
from service.errors import ServiceError

_HEALTHCHECK_TIMEOUT_S = 3.0

Command = Callable[[Namespace], int]


def main() -> None:
    """Run the command line; exits with 0 when all went well."""
    parser = argparse.ArgumentParser(
        prog="dat-serve",
        description="Serve DAT vision models. Settings come from the environment (DAT_...).",
    )
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(title="commands")
    _add(commands, "serve", _serve, "start the server (the default)")
    _add(commands, "healthcheck", _healthcheck, "exit with 0 if the server here is ready")
    _add(commands, "settings", _settings, "print the table of settings")
    _add_evaluate(commands)
    _add_convert(commands)
    arguments = parser.parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except ValidationError as error:
        sys.exit(_fail(*(_setting_fault(fault) for fault in error.errors(include_url=False))))


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Command,
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run=run)
    return parser


def _add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(commands, "evaluate", _evaluate, "measure a model on labelled images")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="images: one subfolder for each class, or those that the annotations name",
    )
    parser.add_argument(
        "--coco", type=Path, metavar="FILE", help="annotations of COCO, to measure a detector"
    )
    parser.add_argument(
        "--resize-mode",
        choices=get_args(settings.ResizeMode),
        help="how a detector resizes the images; without it, as its settings say",
    )
    parser.add_argument("--model", help="name of the model; without it, the default")
    parser.add_argument(
        "--journal",
        type=Path,
        default=Path("evaluation.jsonl"),
        metavar="FILE",
        help="answers as they come; a run that was cut off goes on from here "
        "(default: %(default)s)",
    )


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(commands, "convert", _convert, "write a checkpoint as one .safetensors file")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="to read")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write")
    parser.add_argument("--variant", help="where the weights do not tell")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names to store")
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of a classifier's input, if another"
    )


def _serve(_: Namespace) -> int:
    chosen = settings.Settings()
    logs.configure(chosen.log)
    try:
        return _run_replica(chosen)
    except (ImportError, MemoryError, OSError, RuntimeError, ServiceError) as error:
        missing = machine.shortage(error)
        if missing is not None:
            return _fail(missing)
        if isinstance(error, ServiceError):  # a device that is lost before it is ready
            return _fail(str(error))
        raise


def _run_replica(chosen: settings.Settings) -> int:
    # Loading torch takes seconds; a wrong setting should not wait for it.
    from model.checkpoint import CheckpointError  # noqa: PLC0415
    from service.engine.device import DeviceUnavailable  # noqa: PLC0415
    from service.model_file import ModelFileError  # noqa: PLC0415
    from service.replica import StartupError, serve  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serve(chosen))
        except (CheckpointError, DeviceUnavailable, ModelFileError, StartupError) as error:
            return _fail(str(error))
    return 0


def _evaluate(arguments: Namespace) -> int:
    if arguments.resize_mode is not None and arguments.coco is None:
        return _fail("--resize-mode is for detectors, which --coco measures")
    chosen = settings.Settings()
    logs.configure(chosen.log, sys.stderr)  # standard output is for the result
    from model.checkpoint import CheckpointError  # noqa: PLC0415
    from service.engine.device import DeviceUnavailable  # noqa: PLC0415
    from service.evaluation.accuracy import Accuracy  # noqa: PLC0415
    from service.evaluation.coco import CocoPrecision  # noqa: PLC0415
    from service.evaluation.run import EvaluationError, evaluate  # noqa: PLC0415
    from service.model_file import ModelFileError, choose_models  # noqa: PLC0415

    try:
        entry = choose_models(chosen).find(arguments.model)
        evaluation = (
            Accuracy(arguments.data)
            if arguments.coco is None
            else CocoPrecision(arguments.data, arguments.coco, arguments.resize_mode)
        )
        figures = asyncio.run(evaluate(evaluation, entry, chosen, arguments.journal))
    except (CheckpointError, DeviceUnavailable, EvaluationError, ModelFileError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command goes on from {arguments.journal}")
    print(json.dumps(figures, indent=2))  # noqa: T201
    return 0


def _convert(arguments: Namespace) -> int:
    from model.checkpoint import CheckpointError  # noqa: PLC0415
    from service.convert import convert  # noqa: PLC0415

    chosen = settings.ModelChoice(
        variant=arguments.variant,
        checkpoint=arguments.checkpoint,
        labels=arguments.labels,
        image_size=arguments.image_size,
    )
    try:
        written = convert(chosen, arguments.out)
    except CheckpointError as error:
        return _fail(str(error))
    facts = {name: value for name, value in written.items() if name != "labels"}
    print(f"{arguments.out}: {json.dumps(facts)}")  # noqa: T201
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


def _healthcheck(_: Namespace) -> int:
    server = settings.Settings().server
    host = "127.0.0.1" if server.host in ("0.0.0.0", "::") else server.host  # noqa: S104
    try:
        with urlopen(
            f"http://{host}:{server.http_port}/health/ready", timeout=_HEALTHCHECK_TIMEOUT_S
        ):
            return 0
    except OSError as error:
        return _fail(str(error))


def _settings(_: Namespace) -> int:
    print(settings.table())  # noqa: T201
    return 0
