"""Mean intersection over union of a segmenter on images with label maps.

Every image goes through the decoding that uploads go through, and then straight to the model.
"""

import asyncio
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import checkpoint as checkpoints
from model.checkpoint import CheckpointError
from model.segmentation import Segmenter, segment
from model.segmentation.config import RATIOS
from service import process
from service.computed_tasks import TASKS
from service.engine import gpu
from service.engine.device import open_devices
from service.errors import InvalidImage, ServiceError
from service.evaluation.label_maps import Areas, LabelMaps, measured
from service.evaluation.run import EvaluationError, answer_all, read_journal
from service.images.decode import decode
from service.models.lineup import ModelEntry
from service.models.load import load
from service.open_model import ModelUnusable
from service.settings.settings import Settings

# One is decoded, and another one counted, while the device has a third.
_AT_ONCE = 3


async def evaluate_segmenter(
    maps: LabelMaps, entry: ModelEntry, settings: Settings, journal: Path, *, multi_scale: bool
) -> dict[str, Any]:
    """Measure a segmenter, and continue what the journal has.

    Args:
        maps: images and label maps.
        entry: the model.
        settings: the device and the precision are read.
        journal: a file with the answers as they come.
        multi_scale: whether the model sees every image at six scales, plain and mirrored.

    Returns:
        The figures, with the model and the weights that they are of, for JSON.

    Raises:
        EvaluationError: the data or the journal cannot be used, the model is no segmenter, or the
            device failed.
        ModelUnusable: the weights or the class names cannot be used.
        DeviceUnavailable: the device is not there.
    """
    process.leave_limits_to_us()
    process.choose_kernels(settings.engine.kernels, settings.engine.cache)
    process.compute_float32_in_full()
    try:
        model = load(entry, [task.loader for task in TASKS])
    except CheckpointError as fault:
        raise ModelUnusable(str(fault)) from fault
    if not isinstance(segmenter := model.network, Segmenter):
        raise EvaluationError(
            f"{model.name} is not a segmenter; leave --segmentation out to measure it"
        )
    files = maps.files()
    (device, *others) = open_devices(settings.engine.device, settings.engine.threads)
    for other in others:
        other.close()
    precision = entry.dtype or settings.engine.dtype
    dtype = (
        gpu.default_dtype(device.torch_device) if precision == "auto" else getattr(torch, precision)
    )
    subject = {
        "model": model.name,
        "variant": model.config.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device.torch_device),
        "checkpoint_sha256": checkpoints.sha256(model.source),
        **({"weights": entry.weights} if entry.weights != "model" else {}),
        "data": [str(folder.resolve()) for folder in (maps.images, maps.maps)],
        "reduce_zero_label": maps.reduce_zero_label,
        "multi_scale": multi_scale,
    }
    answers = read_journal(journal, subject)
    left = sum(file not in answers for file in files)
    ratios = RATIOS if multi_scale else (1.0,)
    start = perf_counter()

    def see(pixels: NDArray[np.uint8]) -> NDArray[np.integer[Any]]:
        found = segment(segmenter, pixels, ratios=ratios, mirrored=multi_scale)
        labels: NDArray[np.integer[Any]] = found.labels.numpy(force=True)
        return labels

    async def answer(file: str) -> tuple[str, Areas | None]:
        path = maps.images / file
        try:
            image = await asyncio.to_thread(lambda: decode(path.read_bytes(), settings.limits))
            size = image.height, image.width
            if not all(segmenter.config.resizing(size, ratio).fits for ratio in ratios):
                return file, None
            pixels = np.asarray(image)
            labels = await device.run(partial(see, pixels))
            counted = await asyncio.to_thread(maps.areas, file, labels, len(model.labels))
        except InvalidImage:
            return file, None
        except (OSError, ServiceError) as fault:
            raise EvaluationError(f"{path}: {fault}") from fault
        return file, counted

    try:
        await device.run(lambda: segmenter.cast(dtype).to(device.torch_device))
        await answer_all(answer, files, answers, journal, _AT_ONCE)
    finally:
        device.close()
    speed = {"answered_now": left, "seconds": round(perf_counter() - start, 2)}
    names = [label.name for label in model.labels]
    figures = measured(maps, {file: answers[file] for file in files}, names)
    unreadable = sum(answers[file] is None for file in files)
    return subject | {"images": len(files), "unreadable": unreadable} | figures | speed
