"""Time a classifier compiled by OpenVINO against the engine in torch, side by side.

Rounds alternate between the two (`bench.rival`), and the ratio is taken per round.
"""

import json
from argparse import ArgumentParser, Namespace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.baseline import CONFIGS
from bench.engine import open_engine
from bench.machine import RESULTS, describe
from bench.report import openvino_table
from bench.rival import Pixels, Rival, Run
from bench.weights import recipe_state
from model import create_model
from service.engine.classify import Classify
from service.engine.openvino import OpenVinoClassify


def open_openvino(name: str, threads: int, max_batch: int, cache: Path) -> Run:
    """Load the model into OpenVINO."""
    network = create_model(name)
    network.load_state_dict(recipe_state(name))
    classify = Classify(network, torch.float32).eval()
    compiled = OpenVinoClassify(
        classify, network.config.image_size, range(1, max_batch + 1), threads, cache
    )

    def run(pixels: Pixels) -> NDArray[np.float32]:
        ranked = compiled(torch.from_numpy(pixels))
        return np.take_along_axis(
            ranked.scores.numpy(), ranked.classes.numpy().argsort(axis=-1), axis=-1
        )

    return run


def compare(torchs: Rival, openvino: Rival, batch: int, options: Namespace) -> dict[str, Any]:
    """Time both on one batch in alternating rounds, after one that is thrown away."""
    timed = [
        [rival.time(batch, options.seconds) for rival in (torchs, openvino)]
        for _ in range(options.rounds + 1)
    ]
    ours, theirs = timed[0]
    rates = [[batch / mean(rival.durations) for rival in both] for both in timed[1:]]
    ratios = [second / first for first, second in rates]
    return {
        "batch": batch,
        "torch_images_per_s": median(first for first, _ in rates),
        "openvino_images_per_s": median(second for _, second in rates),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "max_abs_difference": float(np.abs(ours.scores - theirs.scores).max()),
    }


def measure(name: str, options: Namespace, cache: Path) -> dict[str, Any]:
    """Time one model; OpenVINO is loaded twice, first with an empty cache."""
    size = {"threads": options.threads, "max_batch": max(options.batches)}
    torchs = Rival(partial(open_engine, name, "cpu", dtype="float32", **size), name)
    open_theirs = partial(open_openvino, name, cache=cache, **size)
    exporting, openvino = Rival(open_theirs, name), Rival(open_theirs, name)
    exporting.close()
    rows = [compare(torchs, openvino, batch, options) for batch in options.batches]
    for rival in (torchs, openvino):
        rival.close()
    return {
        "model": name,
        "load_s": {
            "torch": torchs.load_s,
            "openvino, exporting": exporting.load_s,
            "openvino, from its cache": openvino.load_s,
        },
        "batches": rows,
    }


def main() -> None:
    """Time the models of the command line, one after another."""
    parser = ArgumentParser(prog="python -m bench.openvino", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=CONFIGS, default=["dat_tiny_224", "dat_pp_tiny_224"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="per side and round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    with TemporaryDirectory() as cache:
        models = [measure(name, options, Path(cache)) for name in options.models]
    result = {
        "machine": describe("bench.openvino", "cpu", options.threads),
        "openvino": version("openvino"),
        "rounds": options.rounds,
        "models": models,
    }
    (RESULTS / "openvino-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(openvino_table(result))


if __name__ == "__main__":
    main()
