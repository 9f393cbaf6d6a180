"""Top-1 and top-5 accuracy over a folder of labelled images, by the way that requests take.

The folder has one subfolder for each class, as torchvision's ImageFolder has it. Every image
goes as an upload through decoding, pre-processing, the batcher and the engine. Each answer is one
line of a journal (JSON lines), so that a run that was cut off goes on where it was.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry
from tqdm import tqdm

from model import checkpoint as checkpoints
from service.classifier import Classification, Classifier, ClassifyOptions
from service.engine.device import Device
from service.errors import InvalidImage, ServiceError
from service.metrics import Metrics
from service.model_file import ModelEntry
from service.open_model import OpenModel, Shared, open_model
from service.served_model import Label
from service.settings import Settings

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
# The best classes of each image by its path; `None` where it could not be decoded.
Answers = dict[str, list[int] | None]

_TOP_K = 5
_PATIENCE_S = 3600.0  # an evaluation has no deadline


class EvaluationError(Exception):
    """The data or the journal cannot be used; the message says what to change."""


@dataclass(frozen=True)
class LabelledImage:
    """One image of the folder.

    Attributes:
        path: relative to the folder.
        target: index of its class.
    """

    path: Path
    target: int


@dataclass(frozen=True)
class Accuracy:
    """What was measured.

    Attributes:
        images: how many were asked, the unreadable ones included; those count as wrong.
        unreadable: how many could not be decoded.
        top1: share of images whose class came first.
        top5: share of images whose class was among the first five.
    """

    images: int
    unreadable: int
    top1: float
    top5: float


def find_images(folder: Path, labels: Sequence[Label]) -> list[LabelledImage]:
    """The images of a folder with the class of each, in order of their paths.

    Subfolders are classes by their names: all are WordNet ids or names of classes, or else there
    are as many as classes, in sorted order.

    Raises:
        EvaluationError: there is no such folder, nothing in it, or its classes are not those of
            the model.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    targets = _targets(folder, classes, labels)
    images = [
        LabelledImage(path.relative_to(folder), targets[name])
        for name in classes
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not images:
        raise EvaluationError(f"{folder}: no {', '.join(sorted(SUFFIXES))} in its subfolders")
    return images


def _targets(folder: Path, classes: list[str], labels: Sequence[Label]) -> dict[str, int]:
    for key in ([label.wnid for label in labels], [label.name for label in labels]):
        by_key = {name: index for index, name in enumerate(key)}
        if len(by_key) == len(key) and set(classes) <= by_key.keys():
            return {name: by_key[name] for name in classes}
    if len(classes) == len(labels):
        return {name: index for index, name in enumerate(classes)}
    raise EvaluationError(
        f"{folder}: has {len(classes)} subfolders that are not all names of classes, expected "
        f"those names, or {len(labels)} subfolders in the order of the classes"
    )


async def evaluate(
    entry: ModelEntry, settings: Settings, folder: Path, journal: Path
) -> dict[str, Any]:
    """Measure a model on a folder, going on with what the journal has.

    Returns:
        The figures, with the model and the weights that they are of, for JSON.

    Raises:
        EvaluationError: the folder or the journal cannot be used, or the device failed.
        model.checkpoint.CheckpointError: the weights or the class names cannot be used.
        DeviceUnavailable: the device is not there.
    """
    device = Device(settings.engine.device, settings.engine.threads)
    decode_threads = settings.limits.decode_threads or os.cpu_count() or 1
    with ThreadPoolExecutor(decode_threads, thread_name_prefix="decode") as workers:
        metrics = Metrics(CollectorRegistry())
        model = open_model(entry, Shared(settings, device, workers, metrics))
        classifier = model.core
        if not isinstance(classifier, Classifier):
            raise EvaluationError(f"{classifier.card.name} is no classifier")
        images = find_images(folder, classifier.labels)
        subject = _subject(model, folder)
        answers = _read_journal(journal, subject)
        left = [image for image in images if str(image.path) not in answers]
        await model.engine.load()
        model.batcher.open()
        running = asyncio.create_task(model.batcher.run())
        start = perf_counter()
        try:
            # Enough at once to keep the decoders busy while a batch waits and one runs.
            at_once = 2 * model.engine.max_batch + 2 * decode_threads
            queue_limit = entry.batching(settings.batching).queue_limit
            with (
                journal.open("a", encoding="utf-8") as file,
                tqdm(total=len(images), initial=len(images) - len(left), unit="image") as bar,
            ):
                async for image, top in _ask(classifier, folder, left, min(at_once, queue_limit)):
                    answers[str(image.path)] = top
                    file.write(json.dumps({"image": str(image.path), "top": top}) + "\n")
                    file.flush()
                    bar.update()
        finally:
            running.cancel()
            device.close()
    speed = {"answered_now": len(left), "seconds": round(perf_counter() - start, 2)}
    return subject | asdict(measure(images, answers)) | speed


def _subject(model: OpenModel, folder: Path) -> dict[str, Any]:
    """What is measured: a journal of anything else must not be gone on with."""
    card = model.core.card
    return {
        "model": card.name,
        "variant": card.variant,
        "image_size": card.image_size and list(card.image_size),
        "dtype": card.dtype,
        "device": card.device,
        "checkpoint_sha256": checkpoints.sha256(model.source),
        "data": str(folder.resolve()),
    }


def _read_journal(path: Path, subject: dict[str, Any]) -> Answers:
    """The answers that a journal has; it is begun, or mended, if need be.

    Raises:
        EvaluationError: it is not a journal, or one of another model or other data.
    """
    try:
        text = path.read_text("utf-8") if path.exists() else ""
        # The line that was being written when the run was cut off is not whole.
        lines = text[: text.rfind("\n") + 1].splitlines()
        head, *rest = [json.loads(line) for line in lines] or [subject]
        answers = {line["image"]: line["top"] for line in rest}
        if head == subject:
            kept = lines or [json.dumps(subject)]
            path.write_text("".join(f"{line}\n" for line in kept), "utf-8")
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise EvaluationError(f"{path}: not a journal that can be gone on with: {fault}") from fault
    if head != subject:
        raise EvaluationError(
            f"{path}: the journal of another evaluation ({head}); remove it or name another file"
        )
    return answers


async def _ask(
    classifier: Classifier, folder: Path, images: Sequence[LabelledImage], at_once: int
) -> AsyncIterator[tuple[LabelledImage, list[int] | None]]:
    """Classify images, a bounded number at once; answers come as they are ready."""
    left = iter(images)
    waiting = {_start(classifier, folder, image) for image in islice(left, at_once)}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            waiting |= {_start(classifier, folder, image) for image in islice(left, len(done))}
            for task in done:
                yield task.result()
    finally:
        for task in waiting:
            task.cancel()


def _start(
    classifier: Classifier, folder: Path, image: LabelledImage
) -> asyncio.Task[tuple[LabelledImage, list[int] | None]]:
    return asyncio.create_task(_top(classifier, folder, image))


async def _top(
    classifier: Classifier, folder: Path, image: LabelledImage
) -> tuple[LabelledImage, list[int] | None]:
    """The best classes of an image, or `None` if it cannot be decoded.

    Raises:
        EvaluationError: the file cannot be read, or the device failed.
    """
    try:
        options = ClassifyOptions(top_k=_TOP_K, timeout_s=_PATIENCE_S)
        upload = await asyncio.to_thread((folder / image.path).read_bytes)
        (outcome,) = await classifier.answer([upload], options)
    except InvalidImage:
        return image, None
    except (OSError, ServiceError) as fault:
        raise EvaluationError(f"{folder / image.path}: {fault}") from fault
    assert isinstance(outcome, Classification), "one image raises its failure"
    return image, [prediction.index for prediction in outcome.predictions]


def measure(images: Sequence[LabelledImage], answers: Answers) -> Accuracy:
    """The accuracy of the answers to some images."""
    top = [(image.target, answers[str(image.path)]) for image in images]
    return Accuracy(
        len(images),
        sum(best is None for _, best in top),
        sum(best is not None and best[0] == target for target, best in top) / len(images),
        sum(best is not None and target in best for target, best in top) / len(images),
    )
