"""Time a classifier compiled by OpenVINO against the engine in torch, side by side.

Rounds alternate between the two (`bench.rival`), and the ratio is taken per round.
"""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from bench.baseline import CONFIGS
from bench.engine import largest_difference, open_engine
from bench.harness import RATIO, Row, alternate, options, publish, ratio, table
from bench.rival import Pixels, Rival, Run
from bench.weights import recipe_checkpoint
from model import load_model
from service.engine.classify import Classify
from service.engine.openvino import OpenVinoClassify


def open_openvino(
    name: str, threads: int, max_batch: int, cache: Path, dtype: str = "float32"
) -> Run:
    """Load the model into OpenVINO."""
    network = load_model(recipe_checkpoint(name), name)
    classify = Classify(network, torch.float32).eval()
    compiled = OpenVinoClassify(
        classify,
        network.config.image_size,
        range(1, max_batch + 1),
        threads,
        cache,
        dtype=getattr(torch, dtype),
    )

    def run(pixels: Pixels) -> NDArray[np.float32]:
        ranked = compiled(torch.from_numpy(pixels))
        return np.take_along_axis(
            ranked.scores.numpy(), ranked.classes.numpy().argsort(axis=-1), axis=-1
        )

    return run


def compare(rivals: dict[str, Rival], batch: int, *, rounds: int, seconds: float) -> Row:
    """Time both on one batch in alternating rounds, after one that is thrown away."""
    sides = {side: partial(rival.time, batch, seconds) for side, rival in rivals.items()}
    timed = alternate(sides, rounds, unmeasured=1)
    rates = {side: [batch / mean(one.durations) for one in timed[side]] for side in sides}
    return {
        "batch": batch,
        **{f"{side}_images_per_s": median(of_side) for side, of_side in rates.items()},
        **ratio(rates["openvino"], rates["torch"]),
        "max_abs_difference": largest_difference(timed["torch"], timed["openvino"]),
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
    }
    return table(columns, (model | row for model in result["models"] for row in model["batches"]))


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
    size = {"threads": chosen.threads, "max_batch": max(chosen.batches)}
    models = []
    for name in chosen.models:
        with TemporaryDirectory() as cache:
            openers = {
                "torch": partial(open_engine, name, "cpu", dtype="float32", **size),
                "openvino": partial(open_openvino, name, cache=Path(cache), **size),
            }
            rivals = {side: Rival(opener, name) for side, opener in openers.items()}
            times = {"rounds": chosen.rounds, "seconds": chosen.seconds}
            rows = [compare(rivals, batch, **times) for batch in chosen.batches]
            for rival in rivals.values():
                rival.close()
        models.append({"model": name, "batches": rows})
    publish("openvino-cpu", tables, chosen, openvino=version("openvino"), models=models)


if __name__ == "__main__":
    main()
