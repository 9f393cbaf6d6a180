"""Whether one model is right on a GPU: `python -m bench.gpu_check NAME [DEVICE]`.

A classifier: its logits in each precision, with the kernels and without, against those of the
official code (of the demo, which has none: against the CPU, on its scenes); then its engine's
graphs against the same work run eagerly, batches with padding and two batches in flight. A
detector: what its engine finds, at several sizes and batches, against the CPU in float32.

Every figure is printed as one JSON object. A case that fails stops none of those after it.
"""

import argparse
import asyncio
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench.findings import find, note
from bench.graphs import DTYPE, Way
from bench.weights import detector_state, recipe_state
from demo.detection import scenes
from demo.evaluate import LARGEST_PICTURE, bundled_model
from demo.views import upload, view
from model import DAT, VARIANTS, create_model
from model.detection import DETECTORS, Detector, create_detector, load_detector
from model.transforms import Normalise
from service.engine.classify import Classify
from service.engine.detection import DetectionEngine, DetectionInput, DetectionOutput
from service.engine.device import Device
from service.engine.engine import Engine, EngineInput, EngineOutput
from service.metrics import Metrics, ModelMetrics
from service.served_model import BUNDLED
from tests import recipe
from tests.service.recorded import recorded

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
DEMO, DEMO_DETECTOR = "dat_nano", "mask_rcnn_dat_nano"
SCENES = {"cpu": 4, "cuda": 400}
SCENES_SEED = 1  # not seen in training

# How far logits may be off. In float32 without TF32, sums in another order are all there is.
LOGITS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}
AGREEMENT = 0.99  # of the best class with float32, on scenes
PROBABILITIES = 0.01  # of a graph and of eager work, which may add up in another order
MEMORY_MB = 2000  # of all graphs of a classifier
# Of the sure objects of the CPU, how many a device must find: one box may lose to another by a
# rounding.
FOUND = {"float32": 0.98, "float16": 0.9, "bfloat16": 0.9}
SURE, NEAR = 0.5, 4  # score of a sure object; pixels between corners of the same box
SIZES = {"cpu": [(192, 320), (160, 224)], "cuda": [(800, 1344), (640, 640)]}  # padded
ROUNDS = {"cpu": 1, "cuda": 25}  # of two batches in flight

failed: list[str] = []


@contextmanager
def case(model: str, title: str) -> Iterator[None]:
    """One case, whose failure is noted and goes no further."""
    began = time.perf_counter()
    try:
        yield
    except Exception as error:
        failed.append(title)
        traceback.print_exc()
        note(model=model, failed=title, error=f"{type(error).__name__}: {str(error)[:300]}")
    print(f"{title}: {time.perf_counter() - began:.1f} s")


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
    def of(cls, name: str, scenes: int) -> "Reference":
        """The official code's golden case, or float32 on the CPU."""
        if name == DEMO:
            model = bundled_model()
            seen = (
                view(*upload(SCENES_SEED, index, LARGEST_PICTURE), model.config).pixels
                for index in range(scenes)
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
    for dtype, bound in LOGITS.items():
        for fused in (True, False) if kind == "cuda" else (False,):
            title = f"{dtype}, {'kernels' if fused else 'plain torch'}"
            with case(name, title), Way(fused=fused).switched():
                # As the engine does: convolutions in float32 are none in TF32.
                torch.backends.cudnn.allow_tf32 = dtype != "float32"
                precision: torch.dtype = getattr(torch, dtype)
                model = deepcopy(reference.model).cast(precision).to(kind)
                logits = _logits(model, reference.images.to(kind, precision)).float().cpu()
                error = (logits - reference.logits).abs().max().item()
                find(name, f"{title}: largest error of the logits", error, at_most=bound)
                same = (logits.argmax(1) == reference.logits.argmax(1)).float().mean().item()
                least = AGREEMENT if name == DEMO else None
                find(name, f"{title}: best class as in float32", same, at_least=least)


def check_graphs(name: str, model: DAT, kind: str) -> None:
    """The graphs of an engine as the service opens it, against the same work run eagerly."""
    dtype = DTYPE[kind]
    height, width = model.config.image_size
    pixels = np.stack([recipe.image(0, index, height, width) for index in range(8)])
    batch = [EngineInput(image, explain=True) for image in pixels]
    eager = Classify(deepcopy(model), dtype).to(kind).eval()
    device = Device(kind, 2)
    on_cpu: dict[str, Any] = {} if kind == "cuda" else {"capture": recorded, "buckets": (1, 4, 8)}
    engine = Engine(
        model,
        device,
        metrics(name, "classify"),
        dtype=str(dtype).removeprefix("torch."),
        **on_cpu,
    )

    async def run() -> None:
        weights_mb = sum(p.nbytes for p in model.parameters()) / 2**20
        before = torch.cuda.memory_reserved() if kind == "cuda" else 0
        began = time.perf_counter()
        await engine.load()
        find(name, f"{len(engine.buckets)} graphs: s to load", time.perf_counter() - began)
        if kind == "cuda":
            taken = (torch.cuda.memory_reserved() - before) / 2**20
            find(name, "all graphs, MB beside the weights", taken - weights_mb, at_most=MEMORY_MB)
        with torch.inference_mode():
            ranked = eager(torch.from_numpy(pixels).to(kind))
        scores, classes = ranked.scores.cpu().numpy(), ranked.classes.cpu().numpy()
        locations = [layer.float().cpu().numpy() for layer in ranked.sampling_locations]
        expected = [
            EngineOutput(scores[row], classes[row], tuple(layer[row] for layer in locations))
            for row in range(len(batch))
        ]
        # Large before small: rows of an earlier batch stay behind as padding.
        for title, sizes in {"whole buckets": (8, 4, 1), "padding": (7, 5)}.items():
            outputs, of = [], []
            for size in sizes:
                outputs += await engine.run_batch(batch[:size])
                of += expected[:size]
            compare(name, f"graph and eager, {title}", outputs, of)
        outputs, of = [], []
        for round_ in range(ROUNDS[kind]):
            rows = slice(4), slice(4, 8 - round_ % 3)
            launched = [await device.run(partial(engine.launch, batch[row])) for row in rows]
            # Read in either order, both long after the second began.
            for result, row in list(zip(launched, rows, strict=True))[:: 1 if round_ % 2 else -1]:
                outputs += await device.wait(result, 60)
                of += expected[row]
        compare(name, "graph and eager, two batches in flight", outputs, of)

    asyncio.run(run())
    device.close()


def compare(
    name: str, title: str, outputs: Sequence[EngineOutput], expected: Sequence[EngineOutput]
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


def detector(name: str) -> Detector:
    """With the weights of its golden case, or as bundled."""
    if name == DEMO_DETECTOR:
        return load_detector(BUNDLED[name]).detector
    built = create_detector(name)
    built.load_state_dict(detector_state(name))
    return built


def picture(name: str, index: int, height: int, width: int) -> NDArray[np.uint8]:
    """A scene for the demo, else one of the test pictures."""
    if name == DEMO_DETECTOR:
        return scenes.scene(SCENES_SEED, index, height, width).pixels
    return recipe.image(0, index, height, width)


def check_detector(name: str, kind: str) -> None:
    """Several sizes and batches in each precision, with graphs, against the CPU in float32."""
    inputs = {
        size: [
            DetectionInput(
                np.pad(picture(name, index, size[0], size[1] - 11), ((0, 0), (0, 11), (0, 0))),
                (size[0], size[1] - 11),
                (1.0, 1.0),
            )
            for index in range(2)
        ]
        for size in SIZES[kind]
    }
    exact: dict[tuple[int, int], list[DetectionOutput]] = {}

    async def found(
        kind: str, dtype: str, counts: Sequence[int], **options: Any
    ) -> dict[tuple[tuple[int, int], int], list[DetectionOutput]]:
        device = Device(kind, 2)
        engine = DetectionEngine(
            detector(name), device, metrics(name, "detect"), dtype=dtype, **options
        )
        await engine.load()
        outputs = {
            (size, count): await engine.run_batch((2 * items)[:count])
            for size, items in inputs.items()
            for count in counts
        }
        device.close()
        return outputs

    with case(name, "on the CPU"):
        for (size, _), outputs in asyncio.run(found("cpu", "float32", (2,), max_batch=2)).items():
            exact[size] = outputs
    options: dict[str, Any] = {"sizes": SIZES[kind], "buckets": (1, 4)}
    if kind == "cpu":
        options["capture"] = recorded
    for dtype in LOGITS if kind == "cuda" else ("float32",):
        with case(name, dtype):
            for (size, count), outputs in asyncio.run(
                found(kind, dtype, (4, 1, 3), **options)
            ).items():
                share = share_found(outputs, 2 * exact[size])
                title = f"{dtype}, {count} of {size[0]}x{size[1]}: found of the CPU's objects"
                find(name, title, share, at_least=FOUND[dtype])


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
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("model", choices=[*VARIANTS, *DETECTORS])
    parser.add_argument("device", choices=DTYPE, nargs="?", default="cuda")
    arguments = parser.parse_args()
    name, kind = arguments.model, arguments.device
    if name in DETECTORS:
        check_detector(name, kind)
    else:
        reference = Reference.of(name, SCENES[kind])
        check_logits(name, reference, kind)
        with case(name, "graphs"):
            check_graphs(name, reference.model, kind)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
