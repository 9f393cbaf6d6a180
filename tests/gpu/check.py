"""Whether one model is right on a GPU: `python -m tests.gpu.check NAME [DEVICE]`.

A classifier: its logits in each precision, with the kernels and without, against those of the
official code (of the demo, which has none: against the CPU, on its scenes); then its engine's
graphs against the same work run eagerly, batches with padding and two batches in flight. A
detector: what its engine finds in batches of several sizes, two in flight, against the CPU in
float32.

Every figure is printed as one JSON object.
"""

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench.findings import Cases, find
from bench.graphs import DTYPE, Way
from bench.weights import make_detector, recipe_state
from demo.detection import scenes
from demo.evaluate import LARGEST_PICTURE, bundled_model
from demo.views import upload, view
from model import DAT, VARIANTS, create_model
from model.detection import DETECTORS
from model.normalise import Normalise
from service import process
from service.engine.classification import ClassificationEngine
from service.engine.classify import Classify
from service.engine.detection import DetectionEngine
from service.engine.device import Device
from service.engine.items import (
    ClassificationInput,
    ClassificationOutput,
    DetectionInput,
    DetectionOutput,
    Wanted,
)
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from tests import recipe
from tests.service.recorded import recorded

GOLDEN = Path(__file__).parent.parent / "golden"
DEMO, DEMO_DETECTOR = "dat_nano", "mask_rcnn_dat_nano"
SCENES = {"cpu": 4, "cuda": 400}
SCENES_SEED = 1  # not seen in training

# How far logits may be off. In float32 without TF32, sums in another order are all there is.
LOGITS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}
# On a CPU float16 is slow.
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "float16", "bfloat16")}
AGREEMENT = 0.99  # of the best class with float32, on scenes
PROBABILITIES = 0.01  # of a graph and of eager work, which may add up in another order
MEMORY_MB = 2000  # of all graphs of a classifier
# Of the sure objects of the CPU, how many a device must find. Among random weights the scores of
# thousands of boxes are close, and half precision finds others: only trained ones are held to it.
FOUND = {"float32": 0.98, "float16": 0.8, "bfloat16": 0.8}
SURE, NEAR = 0.5, 4  # score of a sure object; pixels between corners of the same box
SIZES = {"cpu": [(192, 320), (160, 224)], "cuda": [(800, 1344), (640, 640)]}  # padded
ROUNDS = {"cpu": 2, "cuda": 25}  # of two batches in flight
WAIT_S = 100.0  # for the results of a batch

T = TypeVar("T")

cases = Cases()


def metrics(name: str, task: Any) -> ModelMetrics:
    """Instruments that nobody reads."""
    return Metrics(CollectorRegistry()).add_model(name, "check", task, 1)


@dataclass(frozen=True)
class Reference:
    """What a classifier should say.

    Attributes:
        model: in float32, on the CPU.
        images: `(B, 3, H, W)`, normalised.
        logits: `(B, num_classes)`.
    """

    model: DAT
    images: Tensor
    logits: Tensor

    @classmethod
    def of(cls, name: str, count: int) -> "Reference":
        """The official code's golden case, or float32 on the CPU."""
        if name == DEMO:
            model = bundled_model()
            seen = (
                view(*upload(SCENES_SEED, index, LARGEST_PICTURE), model.config).pixels
                for index in range(count)
            )
            images = Normalise()(torch.from_numpy(np.stack(list(seen))))
            return cls(model, images, _logits(model, images))
        model = create_model(name)
        model.load_state_dict(recipe_state(name))
        size = model.config.image_size
        path = GOLDEN / f"{name}.npz"
        if not path.exists():
            images = torch.from_numpy(recipe.batch(0, [0, 1], *size)).float()
            return cls(model, images, _logits(model, images))
        golden = np.load(path)
        meta = json.loads(str(golden["meta"]))
        images = torch.from_numpy(recipe.batch(meta["input_seed"], meta["image_indices"], *size))
        return cls(model, images.float(), torch.from_numpy(golden["logits"]))


@torch.inference_mode()
def _logits(model: DAT, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(50)])


def check_logits(name: str, reference: Reference, kind: str) -> None:
    """Every precision, with the kernels and without."""
    for dtype in DTYPES[kind]:
        for fused in (True, False) if kind == "cuda" else (False,):
            title = f"{dtype}, {'kernels' if fused else 'plain torch'}"
            with cases.case(name, title), Way(fused=fused).switched():
                precision: torch.dtype = getattr(torch, dtype)
                model = deepcopy(reference.model).cast(precision).to(kind)
                logits = _logits(model, reference.images.to(kind, precision)).float().cpu()
                error = (logits - reference.logits).abs().max().item()
                find(name, f"{title}: largest error of the logits", error, at_most=LOGITS[dtype])
                same = (logits.argmax(1) == reference.logits.argmax(1)).float().mean().item()
                least = AGREEMENT if name == DEMO else None
                find(name, f"{title}: best class as in float32", same, at_least=least)


def check_graphs(name: str, model: DAT, kind: str) -> None:
    """The graphs of an engine as the service opens it, against the same work run eagerly."""
    dtype = DTYPE[kind]
    height, width = model.config.image_size
    pixels = np.stack([recipe.image(0, index, height, width) for index in range(8)])
    batch = [ClassificationInput(image, Wanted(points=True)) for image in pixels]
    eager = Classify(deepcopy(model), dtype).to(kind).eval()
    device = Device(kind, 2)
    on_cpu: dict[str, Any] = {} if kind == "cuda" else {"capture": recorded, "buckets": (1, 4, 8)}
    engine = ClassificationEngine(
        model,
        device,
        metrics(name, "classify"),
        dtype=str(dtype).removeprefix("torch."),
        **on_cpu,
    )

    async def run() -> None:
        computing = await engine.load()
        find(name, f"{computing.graphs} graphs: s to load", computing.seconds)
        find(name, "all graphs, MB", computing.graphs_bytes / 1e6, at_most=MEMORY_MB)
        with torch.inference_mode():
            ranked = eager(torch.from_numpy(pixels).to(kind))
        scores, classes = ranked.scores.cpu().numpy(), ranked.classes.cpu().numpy()
        locations = [layer.float().cpu().numpy() for layer in ranked.sampling_locations]
        expected = [
            ClassificationOutput(
                scores[row], classes[row], tuple(layer[row] for layer in locations)
            )
            for row in range(len(batch))
        ]
        # Large before small: rows of an earlier batch stay behind as padding.
        for title, sizes in {"whole buckets": (8, 4, 1), "padding": (7, 5)}.items():
            outputs: list[ClassificationOutput] = []
            of: list[ClassificationOutput] = []
            for size in sizes:
                outputs += await engine.run_batch(batch[:size])
                of += expected[:size]
            compare(name, f"graph and eager, {title}", outputs, of)
        outputs, of = [], []
        for turn in range(ROUNDS[kind]):
            rows = slice(4), slice(4, 8 - turn % 3)
            for part in await in_flight(device, engine.launch, [batch[r] for r in rows], turn):
                outputs += part
            of += [one for row in rows for one in expected[row]]
        compare(name, "graph and eager, two batches in flight", outputs, of)

    asyncio.run(run())
    device.close()


async def in_flight(
    device: Device,
    launch: Callable[[Any], Callable[[], list[T]]],
    batches: Sequence[Any],
    turn: int,
) -> list[list[T]]:
    """Begin all batches before the results of one are read, in every other turn the last first."""
    begun = [await device.run(partial(launch, batch)) for batch in batches]
    order = list(enumerate(begun))[:: 1 if turn % 2 else -1]
    came = {
        index: await device.compute(partial(_same, one), WAIT_S, device.cores)
        for index, one in order
    }
    return [came[index] for index in range(len(batches))]


def _same(results: Callable[[], T]) -> Callable[[], T]:
    """A launch of what is begun already."""
    return results


def compare(
    name: str,
    title: str,
    outputs: Sequence[ClassificationOutput],
    expected: Sequence[ClassificationOutput],
) -> None:
    """Print how far apart the probabilities and the sampling locations are."""
    scores, points = 0.0, 0.0
    for ours, theirs in zip(outputs, expected, strict=True):
        # By class: of close scores the order may differ.
        mine = dict(zip(ours.classes.tolist(), ours.scores.tolist(), strict=True))
        others = dict(zip(theirs.classes.tolist(), theirs.scores.tolist(), strict=True))
        both = mine.keys() & others.keys()
        scores = max(scores, *(abs(mine[key] - others[key]) for key in both))
        for a, b in zip(ours.sampling_locations, theirs.sampling_locations, strict=True):
            points = max(points, float(np.abs(a - b).max()))
    find(name, f"{title}: probabilities", scores, at_most=PROBABILITIES)
    find(name, f"{title}: sampling locations", points)


def picture(name: str, index: int, height: int, width: int) -> NDArray[np.uint8]:
    """A scene for the demo, else one of the test pictures."""
    if name == DEMO_DETECTOR:
        return scenes.scene(SCENES_SEED, index, height, width).pixels
    return recipe.image(0, index, height, width)


def check_detector(name: str, kind: str) -> None:
    """Several sizes and batches in each precision, with graphs, against the CPU in float32."""
    sizes = SIZES[kind]
    pictures = {size: [item(name, index, size) for index in range(2)] for size in sizes}
    exact: list[list[DetectionOutput]] = []
    with cases.case(name, "on the CPU"):
        exact += asyncio.run(found(name, "cpu", "float32", list(pictures.values()), max_batch=2))
    options: dict[str, Any] = {"sizes": sizes, "buckets": (1, 4)}
    if kind == "cpu":
        options["capture"] = recorded
    # Large before small, and padding behind a full bucket.
    asked = [(size, count) for count in (4, 1, 3) for size in sizes]
    batches = [(2 * pictures[size])[:count] for size, count in asked]
    for dtype in DTYPES[kind]:
        with cases.case(name, dtype):
            came = asyncio.run(found(name, kind, dtype, batches, **options))
            for ((height, width), count), outputs in zip(asked, came, strict=True):
                share = share_found(outputs, 2 * exact[sizes.index((height, width))])
                title = f"{dtype}, {count} of {height}x{width}: found of the CPU's objects"
                held = name == DEMO_DETECTOR or dtype == "float32"
                find(name, title, share, at_least=FOUND[dtype] if held else None)


def item(name: str, index: int, size: tuple[int, int]) -> DetectionInput:
    """A picture with some padding on its right."""
    height, width = size[0], size[1] - 11
    padded = np.pad(picture(name, index, height, width), ((0, 0), (0, 11), (0, 0)))
    return DetectionInput(padded, (height, width), (1.0, 1.0))


async def found(
    name: str, kind: str, dtype: str, batches: Sequence[list[DetectionInput]], **options: Any
) -> list[list[DetectionOutput]]:
    """What an engine finds in batches, of which two are in flight at a time."""
    device = Device(kind, 2)
    engine = DetectionEngine(
        make_detector(name), device, metrics(name, "detect"), dtype=dtype, **options
    )
    await engine.load()
    outputs: list[list[DetectionOutput]] = []
    for turn, first in enumerate(range(0, len(batches), 2)):
        outputs += await in_flight(device, engine.launch, batches[first : first + 2], turn)
    device.close()
    return outputs


def share_found(outputs: Sequence[DetectionOutput], expected: Sequence[DetectionOutput]) -> float:
    """How many of the sure objects of the first images are found in them."""
    hits = []
    for ours, theirs in zip(outputs, expected, strict=False):
        sure = theirs.scores > SURE
        for box, kind in zip(theirs.boxes[sure], theirs.classes[sure], strict=True):
            near = np.abs(ours.boxes - box).max(1) < NEAR
            hits.append(kind in ours.classes[near])
    assert hits, "the CPU is sure of no object"
    return float(np.mean(hits))


def main() -> None:
    """Check the model of the command line; exits with 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("model", choices=[*VARIANTS, *DETECTORS])
    parser.add_argument("device", choices=DTYPE, nargs="?", default="cuda")
    arguments = parser.parse_args()
    name, kind = arguments.model, arguments.device
    process.compute_float32_in_full()  # as the server does
    if name in DETECTORS:
        check_detector(name, kind)
    else:
        reference = Reference.of(name, SCENES[kind])
        check_logits(name, reference, kind)
        with cases.case(name, "graphs"):
            check_graphs(name, reference.model, kind)
    cases.end()


if __name__ == "__main__":
    main()
