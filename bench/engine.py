"""Time the engine of the service against the eager baseline, side by side.

Both take the same pixels and return probabilities on the host, with the same weights, precision
and threads, each in a process as it would be run (`bench.rival`). Rounds alternate between the
two, so that a machine that slows down slows both; the ratio is taken per round. A large matrix
product is timed in the same rounds: nothing that multiplies matrices is faster.
"""

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from bench.baseline import CONFIGS, create_baseline
from bench.machine import RESULTS, describe
from bench.memory import ALL_KEPT
from bench.report import engine_table
from bench.rival import Pixels, Rival, Run, Timed
from bench.weights import recipe_state
from model import DAT, VARIANTS, load_model
from model.checkpoint import Checkpoint
from model.cost import flops
from model.normalise import Normalise
from service import process
from service.engine.classification import ClassificationEngine
from service.engine.device import Device
from service.engine.items import ClassificationInput, ClassificationOutput, Wanted
from service.memory import keep_freed
from service.metrics import Metrics

PRODUCT_SIDE = 4096  # of both matrices


@dataclass(frozen=True)
class OpenEngine:
    """A classifier in its engine.

    Attributes:
        network: on the device.
        run: runs a batch.
    """

    network: DAT
    run: Callable[[Sequence[ClassificationInput]], list[ClassificationOutput]]


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
    engine = ClassificationEngine(
        network, device, metrics, dtype=dtype, max_batch=max_batch, buckets=buckets
    )
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.load())
    return OpenEngine(network, lambda batch: loop.run_until_complete(engine.run_batch(batch)))


def recipe_checkpoint(name: str) -> Checkpoint:
    """Random weights of a variant, as if read from a file."""
    return Checkpoint(Path(f"{name}.pth"), recipe_state(name))


def open_engine(name: str, device: str, threads: int, *, dtype: str, max_batch: int) -> Run:
    """Load the engine as the service does, with `explain` as an option of its runs."""
    engine = load_engine(
        recipe_checkpoint(name), name, Device(device, threads), dtype=dtype, max_batch=max_batch
    )
    keep_freed()

    def run(pixels: Pixels, *, explain: bool = False) -> NDArray[np.float32]:
        outputs = engine.run(
            [ClassificationInput(image, Wanted(points=explain)) for image in pixels]
        )
        return np.stack([output.scores[np.argsort(output.classes)] for output in outputs])

    return run


def open_baseline(name: str, device: str, threads: int, *, dtype: str) -> Run:
    """Load the baseline; below float32 it runs under autocast, as the official code trains."""
    torch.set_num_threads(threads)
    model = create_baseline(name)
    # Its geometry is in its state too.
    model.load_state_dict(model.state_dict() | recipe_state(name))
    model.to(device)
    normalise = Normalise().to(device)
    precision: torch.dtype = getattr(torch, dtype)

    def run(pixels: Pixels) -> NDArray[np.float32]:
        autocast = torch.autocast(device, precision, enabled=precision != torch.float32)
        with torch.inference_mode(), autocast:
            images = normalise(torch.from_numpy(pixels).to(device)).contiguous()
            scores: NDArray[np.float32] = model(images).softmax(-1).float().cpu().numpy()
        return scores

    return run


def open_product(device: str, threads: int, *, dtype: str) -> Run:
    """A product of two square matrices in place of a classifier."""
    torch.set_num_threads(threads)
    left, right = torch.rand(
        2, PRODUCT_SIDE, PRODUCT_SIDE, dtype=getattr(torch, dtype), device=device
    )

    def run(_: Pixels) -> NDArray[np.float32]:
        with torch.inference_mode():
            corner: NDArray[np.float32] = (left @ right)[:1, :1].float().cpu().numpy()
        return corner

    return run


@dataclass(frozen=True)
class Rivals:
    """The sides of the comparison.

    Attributes:
        keeping: the baseline in a process that keeps the memory that it frees.
    """

    name: str
    baseline: Rival
    keeping: Rival
    engine: Rival
    product: Rival

    @classmethod
    def open(cls, name: str, device: str, threads: int, *, dtype: str, max_batch: int) -> Self:
        """Load all, each in its process."""
        where = (device, threads)
        baseline = partial(open_baseline, name, *where, dtype=dtype)
        return cls(
            name,
            Rival(baseline, name),
            Rival(baseline, name, ALL_KEPT),
            Rival(
                partial(open_engine, name, *where, dtype=dtype, max_batch=max_batch),
                name,
                process.ENVIRONMENT,
            ),
            Rival(partial(open_product, *where, dtype=dtype), name),
        )

    def close(self) -> None:
        """End the processes."""
        for rival in (self.baseline, self.keeping, self.engine, self.product):
            rival.close()


def compare(rivals: Rivals, batch: int, *, rounds: int, seconds: float) -> dict[str, object]:
    """Time all on one batch in alternating rounds, after one round that is thrown away."""
    sides: dict[str, Callable[[int, float], Timed]] = {
        "baseline": rivals.baseline.time,
        "keeping": rivals.keeping.time,
        "engine": rivals.engine.time,
        "explained": partial(rivals.engine.time, explain=True),
        "product": rivals.product.time,
    }
    timed = [
        {side: time(batch, seconds) for side, time in sides.items()} for _ in range(rounds + 1)
    ]
    first = timed.pop(0)
    times = [{side: mean(of.durations) for side, of in one.items()} for one in timed]
    ratios = [one["baseline"] / one["engine"] for one in times]
    # Of multiply-adds alike.
    work = batch * flops(VARIANTS[rivals.name]) / PRODUCT_SIDE**3
    return {
        "batch": batch,
        **{
            side: _figures([one[side].durations for one in timed], batch)
            for side in ("baseline", "keeping", "engine")
        },
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_to_keeping": median(one["keeping"] / one["engine"] for one in times),
        "product_gflops": median(2e-9 * PRODUCT_SIDE**3 / one["product"] for one in times),
        "share_of_product_rate": median(work * one["product"] / one["engine"] for one in times),
        "explained_over_plain_time": median(one["explained"] / one["engine"] for one in times),
        "max_abs_difference": float(
            np.abs(first["baseline"].scores - first["engine"].scores).max()
        ),
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
    dtype = arguments.dtype
    for name in arguments.models:
        rivals = Rivals.open(
            name,
            arguments.device,
            arguments.threads,
            dtype=dtype,
            max_batch=max(arguments.batches),
        )
        result = {
            "model": name,
            "device": arguments.device,
            "dtype": dtype,
            "machine": describe("bench.engine", arguments.device, arguments.threads),
            "rounds": arguments.rounds,
            "batches": [
                compare(rivals, batch, rounds=arguments.rounds, seconds=arguments.seconds)
                for batch in arguments.batches
            ],
        }
        rivals.close()
        path = RESULTS / f"engine-{name}-{arguments.device}-{dtype}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}, {arguments.device}, {dtype}\n\n{engine_table(result)}\n")


if __name__ == "__main__":
    main()
