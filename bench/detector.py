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

from bench.closed_loop import COLUMNS, measure_closed_loop, over_all_rounds
from bench.harness import Row, options, publish, table
from bench.load import PICTURES, make_jpeg
from bench.open_engine import OpenEngine
from bench.running_server import running_server
from bench.stages import POST_PROCESSING, STAGES, time_stages
from bench.weights import DETECTOR_CASES, detector_state, make_detector
from model.detection import Detections, Detector
from model.detection.normalise import Normalise
from model.detection.transforms import DIVISOR
from service import process
from service.engine.device import Device
from service.engine.items import DetectionInput
from service.memory import keep_freed

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
            with Image.open(io.BytesIO(make_jpeg(height, width, seed=seed))) as picture:
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

    def forward(item: DetectionInput) -> Detections:
        pixels = torch.from_numpy(item.pixels)[None].to(device)
        resized = torch.tensor([item.resized], device=device)
        dense = detector.dense(normalise(pixels, resized), resized)
        scales = torch.tensor([item.scale_xy], device=device)
        (found,) = detector.find_in(dense, resized, scales).of_images()
        return found

    with torch.inference_mode():
        _, *rounds = (
            time_stages(detector, size, partial(forward, item))
            for item in (inputs[-1], *inputs[:STAGE_ROUNDS])
        )
    times = [seconds for _, seconds in rounds]
    shares = [seconds[POST_PROCESSING] / sum(seconds.values()) for seconds in times]
    return {
        "forward_ms": 1e3 * median(sum(seconds.values()) for seconds in times),
        "stages_ms": {stage: 1e3 * median(seconds[stage] for seconds in times) for stage in STAGES},
        "post_processing_share": median(shares),
        "post_processing_share_range": [min(shares), max(shares)],
        # For the post-processing to have something to do.
        "work": {"detections": [len(found.scores) for found, _ in rounds]},
    }


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
    with running_server(
        {"meta": {}, "state_dict": detector_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE=chosen.device,
        DAT_ENGINE__DTYPE=chosen.dtype,
        DAT_ENGINE__THREADS=chosen.threads,
        DAT_BATCHING__SIZES=json.dumps([case.size]),
        **case.settings,
    ) as server:
        served = measure_closed_loop(
            server,
            lambda batch: partial(opened.run, list(islice(pictures, batch))),
            "http",
            chosen.rounds,
            seconds,
            concurrency=chosen.concurrency,
            path="/v1/detect",
            height=case.upload[0],
            width=case.upload[1],
            seconds=seconds,
            warmup=1 + 2 * forward_s,  # until after the first answer
        )
    return {
        "upload": case.upload,
        "size": case.size,
        **stages,
        "seconds": seconds,
        "closed_loop": [served],
    }


def tables(result: Row) -> str:
    """The tables of one `detector-*.json`: stages of a forward pass, then the server."""
    cases = result["cases"]
    stages = {
        "input": "{size:x}",
        "forward ms": "{forward_ms:.1f}",
        **{f"{stage} ms": f"{{stages_ms[{stage}]:.1f}}" for stage in cases[0]["stages_ms"]},
        "post-processing / forward (range)": "**{post_processing_share:.1%}** "
        "({post_processing_share_range[0]:.1%}-{post_processing_share_range[1]:.1%})",
        "detections, at least": "{detections}",
    }
    rows = (case | {"detections": min(case["work"]["detections"])} for case in cases)
    served = [
        case | over_all_rounds(row, case["seconds"])
        for case in cases
        for row in case["closed_loop"]
    ]
    return f"{table(stages, rows)}\n\n{table({'input': '{size:x}', **COLUMNS}, served)}"


def main() -> None:
    """Measure the models of the command line, one after another.

    A round takes `seconds`, or as many `forwards` where these take longer.
    """
    chosen = options(
        "bench.detector",
        __doc__,
        {"models": DETECTOR_CASES, "sizes": CASES},
        models=["retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny"],
        sizes=list(CASES),
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
        measured = [measure_case(name, case, opened, chosen) for case in cases]
        publish(f"detector-{name}-{chosen.device}-{chosen.dtype}", tables, chosen, cases=measured)


if __name__ == "__main__":
    main()
