"""Time the engine of the service against the eager baseline, side by side.

Both take the same pixels and return probabilities on the host, in this process, with the same
weights, precision and threads. Rounds alternate between the two, so that a machine that slows
down slows both; the ratio is taken per round.
"""

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from bench.baseline import CONFIGS, create_baseline
from bench.closed_loop import time_calls
from bench.machine import describe
from bench.report import engine_table
from bench.weights import recipe_state
from model import DAT, load_model
from model.checkpoint import Checkpoint
from model.transforms import Normalise
from service.engine.device import Device, compute_alone
from service.engine.engine import Engine, EngineInput, EngineOutput
from service.metrics import Metrics
from tests import recipe

RESULTS = Path(__file__).parent / "results"

Pixels = NDArray[np.uint8]
Run = Callable[[Pixels], NDArray[np.float32]]


@dataclass(frozen=True)
class OpenEngine:
    """A classifier in its engine.

    Attributes:
        network: on the device.
        run: runs a batch.
    """

    network: DAT
    run: Callable[[Sequence[EngineInput]], list[EngineOutput]]


def load_engine(
    weights: Checkpoint,
    name: str,
    device: Device,
    *,
    dtype: str,
    max_batch: int = 0,
    buckets: Sequence[int] = (),
    image_size: tuple[int, int] | None = None,
) -> OpenEngine:
    """Load a variant and its engine as the service does; the options are those of the service."""
    network = load_model(weights, name, image_size)
    metrics = Metrics(CollectorRegistry()).add_model(name, "bench", "classify", 1)
    engine = Engine(network, device, metrics, dtype=dtype, max_batch=max_batch, buckets=buckets)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.load())
    return OpenEngine(network, lambda batch: loop.run_until_complete(engine.run_batch(batch)))


def recipe_checkpoint(name: str) -> Checkpoint:
    """Random weights of a variant, as if read from a file."""
    return Checkpoint(Path(f"{name}.pth"), recipe_state(name))


def open_engine(name: str, device: Device, *, dtype: str, max_batch: int) -> tuple[Run, Run]:
    """Load the engine as the service does.

    Returns:
        Two functions from `(B, H, W, 3)` to probabilities: a plain one, and one that asks for
        the sampling points of every image as well.
    """
    engine = load_engine(recipe_checkpoint(name), name, device, dtype=dtype, max_batch=max_batch)

    def run(pixels: Pixels, *, explain: bool) -> NDArray[np.float32]:
        outputs = engine.run([EngineInput(image, explain) for image in pixels])
        return np.stack([output.scores[np.argsort(output.classes)] for output in outputs])

    return partial(run, explain=False), partial(run, explain=True)


def open_baseline(name: str, device: Device, *, dtype: str) -> Run:
    """Load the baseline; below float32 it runs under autocast, as the official code trains.

    It runs in the thread of the device, as the engine does.
    """
    where = device.torch_device
    model = create_baseline(name)
    model.load_state_dict(recipe_state(name))
    model.to(where)
    normalise = Normalise().to(where)
    precision: torch.dtype = getattr(torch, dtype)
    loop = asyncio.new_event_loop()

    def forward(pixels: Pixels) -> NDArray[np.float32]:
        autocast = torch.autocast(where.type, precision, enabled=precision != torch.float32)
        with torch.inference_mode(), autocast:
            images = normalise(torch.from_numpy(pixels).to(where)).contiguous()
            scores: NDArray[np.float32] = model(images).softmax(-1).float().cpu().numpy()
        return scores

    return lambda pixels: loop.run_until_complete(device.run(lambda: forward(pixels)))


def make_pixels(name: str, batch: int) -> Pixels:
    """A batch of test pictures at the model's input size."""
    size = CONFIGS[name].image_size
    return np.stack([recipe.image(0, index, size, size) for index in range(batch)])


def compare(
    baseline: Run, engine: Run, explained: Run, pixels: Pixels, *, rounds: int, seconds: float
) -> dict[str, object]:
    """Time all on one batch in alternating rounds, after one round that is thrown away."""
    calls = [partial(run, pixels) for run in (baseline, engine, explained)]
    for call in calls:
        time_calls(call, seconds)
    timed = [[time_calls(call, seconds) for call in calls] for _ in range(rounds)]
    ratios = [float(np.mean(base) / np.mean(ours)) for base, ours, _ in timed]
    costs = [float(np.mean(points) / np.mean(ours)) for _, ours, points in timed]
    return {
        "batch": len(pixels),
        "baseline": _figures([base for base, _, _ in timed], len(pixels)),
        "engine": _figures([ours for _, ours, _ in timed], len(pixels)),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "explained_over_plain_time": median(costs),
        "max_abs_difference": float(np.abs(baseline(pixels) - engine(pixels)).max()),
    }


def _figures(rounds: list[list[float]], batch: int) -> dict[str, float]:
    calls = [duration for durations in rounds for duration in durations]
    return {
        "images_per_s": median(batch / float(np.mean(durations)) for durations in rounds),
        "p50_ms": 1e3 * float(np.percentile(calls, 50)),
        "p99_ms": 1e3 * float(np.percentile(calls, 99)),
        "calls": len(calls),
    }


def main() -> None:
    """Time the models of the command line, one after another."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=CONFIGS, default=["dat_tiny_224", "dat_pp_tiny_224"]
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="per side and round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    device, dtype = Device(arguments.device, arguments.threads), arguments.dtype
    compute_alone()
    for name in arguments.models:
        baseline = open_baseline(name, device, dtype=dtype)
        engine, explained = open_engine(name, device, dtype=dtype, max_batch=max(arguments.batches))
        result = {
            "model": name,
            "device": arguments.device,
            "dtype": dtype,
            "machine": describe("bench.engine", arguments.device, arguments.threads),
            "rounds": arguments.rounds,
            "batches": [
                compare(
                    baseline,
                    engine,
                    explained,
                    make_pixels(name, batch),
                    rounds=arguments.rounds,
                    seconds=arguments.seconds,
                )
                for batch in arguments.batches
            ],
        }
        path = RESULTS / f"engine-{name}-{arguments.device}-{dtype}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}, {arguments.device}, {dtype}\n\n{engine_table(result)}\n")


if __name__ == "__main__":
    main()
