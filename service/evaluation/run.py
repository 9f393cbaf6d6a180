"""Asks a model about many files, and goes on where a run was cut off.

Every file goes as an upload through decoding, pre-processing, the batcher and the engine. Each
answer is at once one line of a journal (JSON lines).
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Generic

from prometheus_client import CollectorRegistry
from tqdm import tqdm

from model import checkpoint as checkpoints
from service import process
from service.command_errors import CommandError
from service.engine.device import open_devices
from service.errors import InvalidImage, ServiceError
from service.metrics.replica import Metrics
from service.models.lineup import ModelEntry
from service.open_core import open_core, open_decoders
from service.open_model import OpenModel, Shared, open_model
from service.settings.settings import Settings
from service.tasks.core import Answer, AnyCore, Options, TaskAnswer
from service.text_file import read_text

# What the journal keeps of each file's answer, by its path; `None` where it could not be decoded.
Answers = dict[str, Any]
# Gives a file with the record of its answer.
Ask = Callable[[str], Coroutine[Any, Any, tuple[str, Any]]]

_PATIENCE_S = 3600.0  # an evaluation has no deadline


class EvaluationError(CommandError):
    """The data or the journal cannot be used; the message says what to change."""


class Evaluation(ABC, Generic[TaskAnswer]):
    """What is asked of a model, and what is made of its answers.

    Attributes:
        folder: in which the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def data(self) -> list[str]:
        """What the figures are of, by path."""
        return [str(self.folder.resolve())]

    @abstractmethod
    def files(self, core: AnyCore) -> list[str]:
        """The paths of all files, relative to the folder.

        Raises:
            EvaluationError: the data cannot be used, or not for this model.
        """

    def conditions(self, core: AnyCore) -> dict[str, Any]:  # noqa: ARG002
        """What else the figures depend on, for JSON."""
        return {}

    @abstractmethod
    def options(self, timeout_s: float) -> Options:
        """What is asked of every file."""

    @abstractmethod
    def record(self, answer: TaskAnswer) -> Any:
        """What the journal keeps of an answer, for JSON."""

    @abstractmethod
    def measure(self, answers: Answers) -> dict[str, Any]:
        """The figures, for JSON, from the records of all files."""


async def evaluate(
    evaluation: Evaluation[Any], entry: ModelEntry, settings: Settings, journal: Path
) -> dict[str, Any]:
    """Measure a model, and continue what the journal has.

    Returns:
        The figures, with the model and the weights that they are of, for JSON.

    Raises:
        EvaluationError: the data or the journal cannot be used, or the device failed.
        ModelUnusable: the weights or the class names cannot be used.
        DeviceUnavailable: the device is not there.
    """
    process.leave_limits_to_us()
    process.choose_kernels(settings.engine.kernels, settings.engine.cache)
    process.compute_float32_in_full()
    devices = open_devices(settings.engine.device, settings.engine.threads)
    process.compute_alone()
    metrics = Metrics(CollectorRegistry())
    with open_decoders(settings.limits, metrics) as decoders:
        model = open_model(entry, Shared(settings, devices, metrics))
        core = open_core(model.facts, model.batcher, decoders, settings.limits, model.metrics)
        files = evaluation.files(core)
        subject = _subject(model, core, evaluation, entry)
        answers = read_journal(journal, subject)
        left = [file for file in files if file not in answers]
        await model.load()
        process.loaded()
        model.batcher.open()
        running = asyncio.create_task(model.batcher.run())
        start = perf_counter()
        try:
            # Enough at once to keep the decoders busy while every device has its batches.
            places = sum(max(device.depth, device.cores) for device in devices)
            at_once = (1 + places) * core.card.max_batch + 2 * settings.limits.decoders
            at_once = min(at_once, model.facts.queue_limit)
            answer = partial(_answer, evaluation, core)
            await answer_all(answer, files, answers, journal, at_once)
        finally:
            running.cancel()
            await asyncio.wait([running])
            for device in devices:
                device.close()
    speed = {"answered_now": len(left), "seconds": round(perf_counter() - start, 2)}
    figures = evaluation.measure({file: answers[file] for file in files})
    unreadable = sum(answers[file] is None for file in files)
    return subject | {"images": len(files), "unreadable": unreadable} | figures | speed


def _subject(
    model: OpenModel, core: AnyCore, evaluation: Evaluation[Any], entry: ModelEntry
) -> dict[str, Any]:
    """What is measured: a journal of anything else must not be continued."""
    card = core.card
    return {
        "model": card.name,
        "variant": card.variant,
        "image_size": card.image_size and list(card.image_size),
        "dtype": card.dtype,
        "device": card.device,
        "checkpoint_sha256": checkpoints.sha256(model.source),
        **({"weights": entry.weights} if entry.weights != "model" else {}),
        "data": evaluation.data,
        **evaluation.conditions(core),
    }


def read_journal(path: Path, subject: dict[str, Any]) -> Answers:
    """The answers that a journal has; a missing journal is begun, a last line that was cut removed.

    Raises:
        EvaluationError: the file is not a journal, or that of another model or other data.
    """
    try:
        text = read_text(path) if path.exists() else ""
        # The line that was being written when the run was cut off is not whole.
        lines = text[: text.rfind("\n") + 1].splitlines()
        head, *rest = [json.loads(line) for line in lines] or [subject]
        answers = {line["image"]: line["answer"] for line in rest}
        if head == subject:
            kept = lines or [json.dumps(subject)]
            path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise EvaluationError(f"{path}: not a journal that can be continued: {fault}") from fault
    if head != subject:
        raise EvaluationError(
            f"{path}: the journal of another evaluation ({head}); remove it, or name another file "
            "with --journal"
        )
    return answers


async def answer_all(
    answer: Ask, files: Sequence[str], answers: Answers, journal: Path, at_once: int
) -> None:
    """Ask about the files that have no answer yet, and keep the answers as they come.

    Args:
        answer: a file with the record of its answer.
        files: all of them.
        answers: those that the journal has, to which all others are added.
        journal: likewise.
        at_once: most files that are asked about at a time.
    """
    left = [file for file in files if file not in answers]
    records = _ask(answer, left, at_once)
    with (
        journal.open("a", encoding="utf-8") as lines,
        tqdm(total=len(files), initial=len(files) - len(left), unit="image") as bar,
    ):
        async with aclosing(records):
            async for file, record in records:
                answers[file] = record
                lines.write(json.dumps({"image": file, "answer": record}) + "\n")
                lines.flush()
                bar.update()


async def _ask(
    answer: Ask, files: Sequence[str], at_once: int
) -> AsyncGenerator[tuple[str, Any], None]:
    """Ask about files, a bounded number at once; records come as they are ready.

    Once it is closed nothing is asked any more.
    """
    left = iter(files)

    def start(count: int) -> set[asyncio.Task[tuple[str, Any]]]:
        return {asyncio.create_task(answer(file)) for file in islice(left, count)}

    waiting = start(at_once)
    done: set[asyncio.Task[tuple[str, Any]]] = set()
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waiting |= start(len(done))
            for task in done:
                yield task.result()
    finally:
        for task in waiting:
            task.cancel()
        # A request that is cancelled may still begin to decode: its threads must be there.
        await asyncio.gather(*waiting, *done, return_exceptions=True)


async def _answer(evaluation: Evaluation[Any], core: AnyCore, file: str) -> tuple[str, Any]:
    """A file with the record of its answer.

    Raises:
        EvaluationError: the file cannot be read, or the device failed.
    """
    path = evaluation.folder / file
    try:
        upload = await asyncio.to_thread(path.read_bytes)
        (outcome,) = await core.answer([upload], evaluation.options(_PATIENCE_S))
    except InvalidImage:
        return file, None
    except (OSError, ServiceError) as fault:
        raise EvaluationError(f"{path}: {fault}") from fault
    assert isinstance(outcome, Answer), "one image raises its failure"
    return file, evaluation.record(outcome)
