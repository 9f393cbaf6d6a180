"""Time a classifier compiled by OpenVINO against the engine in torch, side by side.

Rounds alternate between the two (`bench.rival`), and the ratio is taken per round.
"""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from bench.baseline import CONFIGS
from bench.engine import open_engine
from bench.harness import in_turn, options, publish, ratio
from bench.machine import describe
from bench.rival import Pixels, Rival, Run
from bench.tables import RATIO, Row, table
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


def compare(rivals: Mapping[str, Rival], batch: int, *, rounds: int, seconds: float) -> Row:
    """Time both on one batch in alternating rounds, after one that is thrown away."""
    sides = {side: partial(rival.time, batch, seconds) for side, rival in rivals.items()}
    first, *timed = in_turn(sides, rounds + 1)
    rates = {side: [batch / mean(one[side].durations) for one in timed] for side in sides}
    return {
        "batch": batch,
        "torch_images_per_s": median(rates["torch"]),
        "openvino_images_per_s": median(rates["openvino"]),
        **ratio(rates["openvino"], rates["torch"]),
        "max_abs_difference": float(np.abs(first["torch"].scores - first["openvino"].scores).max()),
    }


def measure(name: str, chosen: Namespace, cache: Path) -> Row:
    """Time one model; OpenVINO is loaded twice, first with an empty cache."""
    size = {"threads": chosen.threads, "max_batch": max(chosen.batches)}
    torchs = Rival(partial(open_engine, name, "cpu", dtype="float32", **size), name)
    open_theirs = partial(open_openvino, name, cache=cache, **size)
    exporting, openvino = Rival(open_theirs, name), Rival(open_theirs, name)
    exporting.close()
    rivals = {"torch": torchs, "openvino": openvino}
    rows = [
        compare(rivals, batch, rounds=chosen.rounds, seconds=chosen.seconds)
        for batch in chosen.batches
    ]
    for rival in rivals.values():
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


def tables(result: Row) -> str:
    """The table of `openvino-cpu.json`."""
    columns = {
        "model": "{model}",
        "batch": "{batch}",
        "torch img/s": "{torch_images_per_s:rate}",
        "OpenVINO img/s": "{openvino_images_per_s:rate}",
        "OpenVINO / torch (range)": RATIO,
        "largest difference": "{max_abs_difference:.1e}",
        "load s: torch / OpenVINO / from its cache": "{load}",
    }
    rows = [
        row
        | {
            "model": model["model"],
            "load": " / ".join(f"{seconds:.1f}" for seconds in model["load_s"].values()),
        }
        for model in result["models"]
        for row in model["batches"]
    ]
    return table(columns, rows)


def main() -> None:
    """Time the models of the command line, one after another."""
    chosen = options(
        "bench.openvino",
        __doc__,
        {"models": CONFIGS},
        models=list(CONFIGS),
        batches=[1, 2, 4, 8],
        rounds=9,
        seconds=0.5,
        threads=None,
    )
    machine = describe("bench.openvino", "cpu", chosen.threads)
    with TemporaryDirectory() as cache:
        models = [measure(name, chosen, Path(cache)) for name in chosen.models]
    result = {
        "machine": machine,
        "openvino": version("openvino"),
        "rounds": chosen.rounds,
        "models": models,
    }
    publish("openvino-cpu", tables, result)


if __name__ == "__main__":
    main()
