"""The command `dat-serve`."""

import argparse
import asyncio
import json
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterator
from math import inf
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service import healthcheck, logs, machine, preconditions, process
from service.command_errors import CommandError
from service.leaving import leave_while_starting
from service.models.lineup import Lineup, choose_models, require_files
from service.ports import Ports, open_ports
from service.processes import metrics_folder
from service.security.keys import add_key
from service.settings.environment import PREFIX
from service.settings.model import ModelChoice, ResizeMode, Weights
from service.settings.settings import Settings
from service.settings.table import table

_SIGNALLED = 130  # what a shell says of a command that was interrupted

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
    _add_healthcheck(commands)
    _add_key(commands)
    _add(commands, "settings", _settings, "print the table of settings")
    _add_evaluate(commands)
    _add_convert(commands)
    _add_child(commands)
    arguments = parser.parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except ValidationError as error:
        sys.exit(_fail(*_faults(error, _variable)))
    except CommandError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(_SIGNALLED)


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Command,
    summary: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run=run)
    return parser


def _add_healthcheck(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(commands, "healthcheck", _healthcheck, "exit with 0 if the server is ready")
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="http://, https://, grpc:// or grpcs:// and a host; without it, the server of this "
        "machine",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=3.0,
        metavar="SECONDS",
        help="longest to wait (default: %(default)s)",
    )
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="certificates (PEM) that sign the server's"
    )
    parser.add_argument(
        "--certificate",
        type=Path,
        metavar="FILE",
        help="of the client (PEM), where one is asked for",
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="of that certificate, if another file holds it"
    )


def _add_key(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = _add(
        commands,
        "key",
        _key,
        "make an API key, print it this once, and append its hash to the file",
    )
    parser.add_argument("name", metavar="NAME", help="of the key, in the log and in the metrics")
    parser.add_argument(
        "--file", type=Path, help="key file; without it, that of DAT_SECURITY__API_KEYS"
    )
    parser.add_argument(
        "--images-per-s",
        type=float,
        metavar="N",
        help="images that it may ask for, on average (default: any number)",
    )
    parser.add_argument(
        "--burst",
        type=int,
        metavar="N",
        help="images that it may ask for at once (default: those of a second)",
    )


def _add_child(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The processes of a server, which the supervisor starts."""
    parser = commands.add_parser("child")
    parser.add_argument("supervisor", type=int)
    parser.add_argument("birth")
    parser.set_defaults(run=_child)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < inf:
        raise ValueError(text)
    return seconds


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
        "--segmentation",
        type=Path,
        metavar="DIR",
        help="label maps (PNG, an index for each pixel), to measure a segmenter",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action="store_true",
        help="0 in a label map is ignored and 1 is the first class, as in ADE20K's",
    )
    parser.add_argument(
        "--multi-scale",
        action="store_true",
        help="a segmenter sees every image at six scales, plain and mirrored",
    )
    parser.add_argument(
        "--resize-mode",
        choices=get_args(ResizeMode),
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
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="model",
        help="those that were trained, or their moving average (default: %(default)s)",
    )
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names to store")
    parser.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of a classifier's input, if another"
    )


def _serve(_: Namespace) -> int:
    leave_while_starting()
    chosen = Settings()
    lineup = choose_models(chosen)
    require_files(chosen, lineup)
    preconditions.require(chosen)

    def serve() -> int:
        lines = logs.configure(chosen.log)
        logs.never_wait_for_errors()
        with open_ports(chosen.server) as (ports, metrics_port):
            return _serve_on(ports, metrics_port, chosen, lineup, lines)

    return _with_enough(serve)


def _with_enough(work: Callable[[], int]) -> int:
    """Do work, and say it in a sentence if the machine has not enough of something."""
    try:
        return work()
    except (ImportError, MemoryError, OSError, RuntimeError, SystemError) as error:
        missing = machine.shortage(error)
        if missing is None:
            raise
        return _fail(missing)


def _serve_on(
    ports: Ports,
    metrics_port: socket.socket,
    chosen: Settings,
    lineup: Lineup,
    lines: logs.LineWriter,
) -> int:
    front_ends = chosen.front_ends
    if front_ends:
        return _supervise_on(ports, metrics_port, chosen, lineup, lines, front_ends=front_ends)
    # Torch is loaded from here on. That takes seconds, so wrong settings and taken ports were found
    # before; and torch reads the environment when it is loaded.
    process.begin()
    from service.replica import serve  # noqa: PLC0415

    return _run(serve(chosen, lineup, ports, metrics_port, lines))


def _supervise_on(
    ports: Ports,
    metrics_port: socket.socket,
    chosen: Settings,
    lineup: Lineup,
    lines: logs.LineWriter,
    *,
    front_ends: int,
) -> int:
    folder = metrics_folder.open_folder(front_ends + 1 + len(chosen.engine.device.split(",")))
    try:
        process.share_metrics(folder)
        from service.processes.supervisor import ChildFailed, supervise  # noqa: PLC0415

        supervising = supervise(
            chosen, lineup, ports, metrics_port, lines, front_ends=front_ends, folder=folder
        )
        try:
            return _run(supervising)
        except ChildFailed:  # it has said why
            return 1
    finally:
        metrics_folder.close_folder(folder)


def _child(arguments: Namespace) -> int:
    from service.processes.birth import Birth, end_with_parent  # noqa: PLC0415

    end_with_parent(arguments.supervisor)
    # They may come to all processes; one tells the rest.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    birth = Birth.read(arguments.birth)
    chosen = Settings()
    lines = logs.configure(chosen.log, process=birth.name)
    logs.never_wait_for_errors()
    process.begin()

    def live() -> int:
        if birth.kind == "worker":
            from service.processes.worker import work  # noqa: PLC0415

            return _run(work(birth, chosen))
        from service.processes.front_end import answer  # noqa: PLC0415

        return _run(answer(birth, chosen, lines))

    return _with_enough(live)


def _run(serving: Coroutine[Any, Any, None]) -> int:
    """Run what serves to its end, on the event loop of all processes that serve."""
    import uvloop  # noqa: PLC0415

    from service.errors import ServiceError  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(serving)
        except ServiceError as error:  # a device was lost before anybody was ready
            return _fail(machine.shortage(error) or str(error))
    return 0


def _evaluate(arguments: Namespace) -> int:
    if (wrong := _contradiction(arguments)) is not None:
        return _fail(wrong)
    chosen = Settings()
    lineup = choose_models(chosen)
    require_files(chosen, lineup)
    logs.configure(chosen.log, sys.stderr)  # standard output is for the result
    process.begin()
    from service.evaluation.accuracy import Accuracy  # noqa: PLC0415
    from service.evaluation.coco import CocoPrecision  # noqa: PLC0415
    from service.evaluation.label_maps import LabelMaps  # noqa: PLC0415
    from service.evaluation.run import evaluate  # noqa: PLC0415
    from service.evaluation.segmentation import evaluate_segmenter  # noqa: PLC0415

    try:
        entry = lineup.find(arguments.model)
        if arguments.segmentation is not None:
            maps = LabelMaps(
                arguments.data,
                arguments.segmentation,
                reduce_zero_label=arguments.reduce_zero_label,
            )
            measuring = evaluate_segmenter(
                maps, entry, chosen, arguments.journal, multi_scale=arguments.multi_scale
            )
        else:
            evaluation = (
                Accuracy(arguments.data)
                if arguments.coco is None
                else CocoPrecision(arguments.data, arguments.coco, arguments.resize_mode)
            )
            measuring = evaluate(evaluation, entry, chosen, arguments.journal)
        figures = asyncio.run(measuring)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command goes on from {arguments.journal}")
    print(json.dumps(figures, indent=2))  # noqa: T201
    return 0


def _contradiction(arguments: Namespace) -> str | None:
    """What of the options of an evaluation does not go together."""
    if arguments.resize_mode is not None and arguments.coco is None:
        return "--resize-mode is for detectors, which --coco measures"
    if arguments.segmentation is None and (arguments.reduce_zero_label or arguments.multi_scale):
        return (
            "--reduce-zero-label and --multi-scale are for segmenters, which --segmentation "
            "measures"
        )
    if arguments.segmentation is not None and arguments.coco is not None:
        return "--coco measures a detector and --segmentation a segmenter: give one of the two"
    return None


def _convert(arguments: Namespace) -> int:
    from model.checkpoint import CheckpointError  # noqa: PLC0415
    from service.computed_tasks import TASKS  # noqa: PLC0415
    from service.models.convert import convert  # noqa: PLC0415

    try:
        chosen = ModelChoice(
            variant=arguments.variant,
            checkpoint=arguments.checkpoint,
            weights=arguments.weights,
            labels=arguments.labels,
            image_size=arguments.image_size,
        )
    except ValidationError as error:
        return _fail(*_faults(error, _option))
    try:
        written = convert(chosen, arguments.out, [task.loader for task in TASKS])
    except CheckpointError as error:
        return _fail(str(error))
    facts = {name: value for name, value in written.items() if name not in ("labels", "palette")}
    print(f"{arguments.out}: {json.dumps(facts)}")  # noqa: T201
    return 0


def _faults(error: ValidationError, name: Callable[[tuple[int | str, ...]], str]) -> Iterator[str]:
    """One line for each setting that is wrong."""
    told: dict[str, ErrorDetails] = {}
    for fault in error.errors(include_url=False):
        named = name(fault["loc"])
        # A setting may be of several types: show the fault of the type that it comes nearest to.
        if named not in told or len(fault["loc"]) > len(told[named]["loc"]):
            told[named] = fault
    for named, fault in told.items():
        message = fault["msg"].removeprefix("Value error, ")
        if isinstance(fault["input"], str | int | float):
            message += f"; it is {fault['input']!r:.60}"
        yield f"{named}: {message}" if named else message


def _variable(place: tuple[int | str, ...]) -> str:
    """The variable of a setting, from where pydantic found a fault: a group and its field."""
    return PREFIX + "__".join(map(str, place[:2])).upper() if place else ""


def _option(place: tuple[int | str, ...]) -> str:
    """The option of the command line, from the field that it sets."""
    return f"--{place[0]}".replace("_", "-") if place else ""


def _fail(*messages: str) -> int:
    for message in messages:
        print(f"dat-serve: {logs.printable(message)}", file=sys.stderr)  # noqa: T201
    return 1


def _healthcheck(arguments: Namespace) -> int:
    url = arguments.url
    if url is None:
        chosen = Settings()
        tls = chosen.security.tls_certificate is not None
        url = healthcheck.address(chosen.server, tls=tls)
    trust = healthcheck.Trust(
        arguments.ca,
        arguments.certificate,
        arguments.key,
        # A certificate is for the name by which others call this machine.
        blind=arguments.url is None and arguments.ca is None,
    )
    healthcheck.ask(url, timeout_s=arguments.timeout, trust=trust)
    return 0


def _key(arguments: Namespace) -> int:
    path = arguments.file or Settings().security.api_keys
    if path is None:
        return _fail("which key file? Give --file or set DAT_SECURITY__API_KEYS")
    try:
        key = add_key(path, arguments.name, arguments.images_per_s, arguments.burst)
    except ValidationError as error:
        return _fail(
            *_faults(error, lambda place: "NAME" if place == ("name",) else _option(place))
        )
    print(key)  # noqa: T201
    return 0


def _settings(_: Namespace) -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may leave early
    print(table())  # noqa: T201
    return 0
