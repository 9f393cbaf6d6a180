"""Measure detectors: stages of a forward pass, and the real server beside its engine alone.

An upload has the size of the input, so that nothing is resized: 800x1333 pixels become the
official 800x1344, 640x640 stay what they are in a server that letterboxes to that square. Every
round is as long as some forward passes take, however slow the detector is.
"""

import argparse
import asyncio
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench.closed_loop import EngineAlone, measure_closed_loop
from bench.load import CLIENTS, PICTURES, make_jpeg
from bench.machine import RESULTS, describe
from bench.report import detector_tables
from bench.running_server import running_server
from bench.stages import POST_PROCESSING, STAGES, time_stages
from bench.weights import DETECTOR_CASES, detector_state
from model.detection import Detections, Detector, create_detector
from model.detection.config import SCORE_THRESHOLD
from model.detection.detector import DenseFeatures
from model.detection.normalise import Normalise
from model.detection.roi_heads import TwoStageHead
from model.detection.rpn import proposals
from model.detection.transforms import DIVISOR
from service import process
from service.engine.detection import DetectionEngine
from service.engine.device import Device
from service.engine.items import DetectionInput
from service.memory import keep_freed
from service.metrics import Metrics

QUALITY = 90  # of the JPEGs
STAGE_ROUNDS = 5


@dataclass(frozen=True)
class Case:
    """One size of input.

    Attributes:
        upload: `(H, W)` of the images, pixels.
        settings: with which a server takes them as they are.
    """

    upload: tuple[int, int]
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """`(H, W)` of the input with its padding, pixels."""
        height, width = (-(-side // DIVISOR) * DIVISOR for side in self.upload)
        return height, width

    def inputs(self) -> list[DetectionInput]:
        """What a server makes of the pictures that the load generator sends."""
        height, width = self.upload
        inputs = []
        for seed in range(PICTURES):
            padded = np.zeros((*self.size, 3), np.uint8)
            with Image.open(io.BytesIO(make_jpeg(height, width, QUALITY, seed))) as picture:
                padded[:height, :width] = np.asarray(picture)
            inputs.append(DetectionInput(padded, self.upload, (1.0, 1.0)))
        return inputs


CASES = {
    "800x1344": Case((800, 1333)),
    "640x640": Case(
        (640, 640), {"DAT_MODEL__RESIZE_MODE": "letterbox", "DAT_MODEL__LETTERBOX_SIZE": 640}
    ),
}


@dataclass(frozen=True)
class OpenDetector:
    """A detector in its engine.

    Attributes:
        state: its weights, with official keys.
        detector: the module, on the device.
        dtype: of its features.
        run: runs a batch on the engine.
        in_its_thread: does work in the thread of the device.
    """

    state: dict[str, Tensor]
    detector: Detector
    dtype: torch.dtype
    run: Callable[[Sequence[DetectionInput]], object]
    in_its_thread: Callable[[Callable[[], Any]], Any]


def open_detector(
    name: str, sizes: Sequence[tuple[int, int]], arguments: argparse.Namespace
) -> OpenDetector:
    """Load a detector and its engine as the service does, ready for inputs of some sizes."""
    state = detector_state(name)
    detector = create_detector(name)
    detector.load_state_dict(state)
    device = Device(arguments.device, arguments.threads)
    process.compute_alone()
    engine = DetectionEngine(
        detector,
        device,
        Metrics(CollectorRegistry()).add_model(name, "bench", "detect", 1),
        dtype=arguments.dtype,
        sizes=sizes,
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.load())
    keep_freed()
    return OpenDetector(
        state,
        detector,
        engine.dtype,
        lambda batch: loop.run_until_complete(engine.run_batch(batch)),
        lambda work: loop.run_until_complete(device.run(work)),
    )


def measure_stages(opened: OpenDetector, inputs: list[DetectionInput]) -> dict[str, Any]:
    """Time the stages picture by picture, without CUDA graphs, after one that is thrown away."""
    detector, size = opened.detector, inputs[0].padded_size
    device = next(detector.parameters()).device
    normalise = Normalise(opened.dtype).to(device)

    def forward(item: DetectionInput) -> tuple[DenseFeatures, Detections]:
        pixels = torch.from_numpy(item.pixels)[None].to(device)
        resized = torch.tensor([item.resized], device=device)
        dense = detector.dense(normalise(pixels, resized), resized)
        scales = torch.tensor([item.scale_xy], device=device)
        (found,) = detector.find_in(dense, resized, scales).of_images()
        return dense, found

    rounds, work = [], []
    with torch.inference_mode():
        time_stages(detector, size, partial(forward, inputs[-1]))
        for item in inputs[:STAGE_ROUNDS]:
            outputs, seconds = time_stages(detector, size, partial(forward, item))
            rounds.append(seconds)
            work.append(count_work(detector, *outputs))
    shares = [seconds[POST_PROCESSING] / sum(seconds.values()) for seconds in rounds]
    return {
        "forward_ms": 1e3 * median(sum(seconds.values()) for seconds in rounds),
        "stages_ms": {
            stage: 1e3 * median(seconds[stage] for seconds in rounds) for stage in STAGES
        },
        "post_processing_share": median(shares),
        "post_processing_share_range": [min(shares), max(shares)],
        "work": {key: [counts[key] for counts in work] for key in work[0]},
    }


def count_work(detector: Detector, dense: DenseFeatures, found: Detections) -> dict[str, int]:
    """How much the post-processing of one image had to do.

    `candidates` enter the first NMS, `proposals` the box heads of a detector of two stages.
    """
    counts = {"candidates": dense.candidates.scores.numel()}
    if isinstance(detector.head, TwoStageHead):
        counts["proposals"] = int(proposals(dense.candidates).counts)
    else:
        counts["candidates"] = int((dense.candidates.scores > SCORE_THRESHOLD).sum())
    return counts | {"detections": len(found.scores)}


def measure_case(case: Case, opened: OpenDetector, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the stages at one size, then alternate rounds of the engine and of a server."""
    inputs = case.inputs()
    stages = opened.in_its_thread(partial(measure_stages, opened, inputs))
    forward_s = stages["forward_ms"] / 1e3
    seconds = max(arguments.seconds, arguments.forwards * forward_s)
    pictures = cycle(inputs)
    alone = EngineAlone(lambda size: partial(opened.run, list(islice(pictures, size))), seconds)
    with running_server(
        {"meta": {}, "state_dict": opened.state},
        DAT_MODEL__NAME=opened.detector.config.name,
        DAT_ENGINE__DEVICE=arguments.device,
        DAT_ENGINE__DTYPE=arguments.dtype,
        DAT_ENGINE__THREADS=arguments.threads,
        DAT_BATCHING__SIZES=json.dumps([case.size]),
        **case.settings,
    ) as server:
        rows = [
            measure_closed_loop(
                server,
                alone,
                protocol,
                arguments.concurrency,
                arguments.rounds,
                task="detect",
                height=case.upload[0],
                width=case.upload[1],
                quality=QUALITY,
                seconds=seconds,
                warmup=1 + 2 * forward_s,  # until after the first answer
            )
            for protocol in arguments.protocols
        ]
    return {
        "upload": case.upload,
        "size": case.size,
        **stages,
        "seconds": seconds,
        "closed_loop": rows,
    }


def main() -> None:
    """Measure the models of the command line, one after another."""
    parser = argparse.ArgumentParser(prog="python -m bench.detector", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=DETECTOR_CASES,
        default=["retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny"],
    )
    parser.add_argument("--sizes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--protocols", nargs="+", choices=CLIENTS, default=["http"])
    parser.add_argument("--concurrency", type=int, default=2, help="requests in flight")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round, at least")
    parser.add_argument("--forwards", type=int, default=3, help="of a round, at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    cases = [CASES[size] for size in arguments.sizes]
    for name in arguments.models:
        opened = open_detector(name, [case.size for case in cases], arguments)
        result = {
            "model": name,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "machine": describe("bench.detector", arguments.device, arguments.threads),
            "settings": vars(arguments),
            "cases": [measure_case(case, opened, arguments) for case in cases],
        }
        path = RESULTS / f"detector-{name}-{arguments.device}-{arguments.dtype}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}, {arguments.device}, {arguments.dtype}\n\n{detector_tables(result)}\n")


if __name__ == "__main__":
    main()
