"""Measure detectors: stages of a forward pass, and the real server beside its engine alone.

An upload has the size of the input, so that nothing is resized: 800x1333 pixels become the
official 800x1344, 640x640 stay what they are in a server that letterboxes to that square. Every
round is as long as some forward passes take, however slow the detector is.
"""

import io
import json
from argparse import Namespace
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from statistics import median

import numpy as np
import torch
from PIL import Image

from bench.closed_loop import COLUMNS, EngineAlone, measure_closed_loop, over_all_rounds
from bench.harness import options, publish
from bench.load import CLIENTS, PICTURES, make_jpeg
from bench.machine import describe
from bench.open_engine import OpenEngine
from bench.running_server import running_server
from bench.stages import POST_PROCESSING, STAGES, time_stages
from bench.tables import Row, table
from bench.weights import DETECTOR_CASES, detector_state, make_detector
from model.detection import Detections, Detector
from model.detection.config import SCORE_THRESHOLD
from model.detection.detector import DenseFeatures
from model.detection.normalise import Normalise
from model.detection.roi_heads import TwoStageHead
from model.detection.rpn import proposals
from model.detection.transforms import DIVISOR
from service import process
from service.engine.device import Device
from service.engine.items import DetectionInput
from service.memory import keep_freed

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


def measure_stages(detector: Detector, inputs: list[DetectionInput], dtype: str) -> Row:
    """Time the stages picture by picture, without CUDA graphs, after one that is thrown away."""
    size, device = inputs[0].padded_size, next(detector.parameters()).device
    normalise = Normalise(getattr(torch, dtype)).to(device)

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


def measure_case(name: str, case: Case, opened: OpenEngine, chosen: Namespace) -> Row:
    """Time the stages at one size, then alternate rounds of the engine and of a server."""
    inputs = case.inputs()
    assert isinstance(opened.network, Detector)
    stages = opened.in_its_thread(
        partial(measure_stages, opened.network, inputs, dtype=chosen.dtype)
    )
    forward_s = stages["forward_ms"] / 1e3
    seconds = max(chosen.seconds, chosen.forwards * forward_s)
    pictures = cycle(inputs)
    alone = EngineAlone(lambda size: partial(opened.run, list(islice(pictures, size))), seconds)
    with running_server(
        {"meta": {}, "state_dict": detector_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE=chosen.device,
        DAT_ENGINE__DTYPE=chosen.dtype,
        DAT_ENGINE__THREADS=chosen.threads,
        DAT_BATCHING__SIZES=json.dumps([case.size]),
        **case.settings,
    ) as server:
        rows = [
            measure_closed_loop(
                server,
                alone,
                protocol,
                chosen.concurrency,
                chosen.rounds,
                path="/v1/detect",
                height=case.upload[0],
                width=case.upload[1],
                quality=QUALITY,
                seconds=seconds,
                warmup=1 + 2 * forward_s,  # until after the first answer
            )
            for protocol in chosen.protocols
        ]
    return {
        "upload": case.upload,
        "size": case.size,
        **stages,
        "seconds": seconds,
        "closed_loop": rows,
    }


def tables(result: Row) -> str:
    """The tables of one `detector-*.json`: stages of a forward pass, then the server."""
    of_cases = result["cases"]
    stages = {
        "input": "{size:x}",
        "forward ms": "{forward_ms:.1f}",
        **{
            f"{stage} ms": f"{{stages_ms[{stage}]:.1f}}"
            for stage in result["cases"][0]["stages_ms"]
        },
        "post-processing / forward (range)": "**{post_processing_share:.1%}** "
        "({post_processing_share_range[0]:.1%}-{post_processing_share_range[1]:.1%})",
        "candidates": "{candidates}",
        "proposals": "{proposals}",
        "detections": "{detections}",
    }
    work = ("candidates", "proposals", "detections")
    served = [
        case | over_all_rounds(row, case["seconds"])
        for case in of_cases
        for row in case["closed_loop"]
    ]
    cases = [case | {key: _span(case["work"].get(key)) for key in work} for case in result["cases"]]
    return f"{table(stages, cases)}\n\n{table({'input': '{size:x}', **COLUMNS}, served)}"


def _span(counts: list[int] | None) -> str:
    if not counts:
        return "none"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def main() -> None:
    """Measure the models of the command line, one after another.

    A round takes `seconds`, or as many `forwards` where these take longer.
    """
    chosen = options(
        "bench.detector",
        __doc__,
        {"models": DETECTOR_CASES, "sizes": CASES, "protocols": CLIENTS},
        models=["retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny"],
        sizes=list(CASES),
        protocols=["http"],
        concurrency=2,
        rounds=3,
        seconds=2.0,
        forwards=3,
        threads=None,
        device="cpu",
        dtype="float32",
    )
    cases = [CASES[size] for size in chosen.sizes]
    for name in chosen.models:
        device = Device(chosen.device, chosen.threads)
        process.compute_alone()
        sizes = [case.size for case in cases]
        opened = OpenEngine(make_detector(name), device, chosen.dtype, sizes=sizes)
        keep_freed()
        result = {
            "model": name,
            "device": chosen.device,
            "dtype": chosen.dtype,
            "machine": describe("bench.detector", chosen.device, chosen.threads),
            "settings": vars(chosen),
            "cases": [measure_case(name, case, opened, chosen) for case in cases],
        }
        publish(f"detector-{name}-{chosen.device}-{chosen.dtype}", tables, result)


if __name__ == "__main__":
    main()
