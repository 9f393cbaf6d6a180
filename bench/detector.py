"""Measure detectors: stages of a forward pass, and the real server beside its engine alone.

An upload has the size of the input, so that nothing is resized: 800x1333 pixels become the
official 800x1344. Every round is as long as some forward passes take, however slow the detector is.
"""

import io
import json
from argparse import Namespace
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
from service import process
from service.engine.device import Device
from service.engine.items import DetectionInput
from service.memory import keep_freed

UPLOAD, SIZE = (800, 1333), (800, 1344)  # `(H, W)` of an image, without its padding and with it
STAGE_ROUNDS = 5


def make_inputs() -> list[DetectionInput]:
    """What a server makes of the pictures that the load generator sends."""
    height, width = UPLOAD
    inputs = []
    for seed in range(PICTURES):
        padded = np.zeros((*SIZE, 3), np.uint8)
        with Image.open(io.BytesIO(make_jpeg(height, width, seed=seed))) as picture:
            padded[:height, :width] = np.asarray(picture)
        inputs.append(DetectionInput(padded, UPLOAD, (1.0, 1.0)))
    return inputs


def measure_stages(detector: Detector, inputs: list[DetectionInput]) -> Row:
    """Time the stages picture by picture, after one that is thrown away."""
    normalise = Normalise(torch.float32)

    def forward(item: DetectionInput) -> Detections:
        pixels, resized = torch.from_numpy(item.pixels)[None], torch.tensor([item.resized])
        dense = detector.dense(normalise(pixels, resized), resized)
        (found,) = detector.find_in(dense, resized, torch.tensor([item.scale_xy])).of_images()
        return found

    with torch.inference_mode():
        _, *rounds = (
            time_stages(detector, SIZE, partial(forward, item))
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


def measure(name: str, chosen: Namespace) -> Row:
    """Time the stages, then alternate rounds of the engine and of a server."""
    process.compute_alone()
    opened = OpenEngine(make_detector(name), Device("cpu", chosen.threads), "float32", sizes=[SIZE])
    keep_freed()
    inputs = make_inputs()
    assert isinstance(opened.network, Detector)
    stages = opened.in_its_thread(partial(measure_stages, opened.network, inputs))
    forward_s = stages["forward_ms"] / 1e3
    seconds = max(chosen.seconds, chosen.forwards * forward_s)
    pictures = cycle(inputs)
    with running_server(
        {"meta": {}, "state_dict": detector_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE="cpu",
        DAT_ENGINE__DTYPE="float32",
        DAT_ENGINE__THREADS=chosen.threads,
        DAT_BATCHING__SIZES=json.dumps([SIZE]),
    ) as server:
        served = measure_closed_loop(
            server,
            lambda batch: partial(opened.run, list(islice(pictures, batch))),
            "http",
            chosen.rounds,
            seconds,
            concurrency=chosen.concurrency,
            path="/v1/detect",
            height=UPLOAD[0],
            width=UPLOAD[1],
            seconds=seconds,
            warmup=1 + 2 * forward_s,  # until after the first answer
        )
    return {"upload": UPLOAD, "size": SIZE, **stages, "seconds": seconds, "closed_loop": [served]}


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
    served = (
        case | over_all_rounds(row, case["seconds"])
        for case in cases
        for row in case["closed_loop"]
    )
    return f"{table(stages, rows)}\n\n{table({'input': '{size:x}', **COLUMNS}, served)}"


def main() -> None:
    """Measure the models of the command line, one after another.

    A round takes `seconds`, or as many `forwards` where these take longer.
    """
    chosen = options(
        "bench.detector",
        __doc__,
        {"models": DETECTOR_CASES},
        models=["retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny"],
        concurrency=2,
        rounds=3,
        seconds=2.0,
        forwards=3,
        threads=None,
    )
    for name in chosen.models:
        cases = [measure(name, chosen)]
        publish(f"detector-{name}-cpu-float32", tables, chosen, cases=cases)


if __name__ == "__main__":
    main()
