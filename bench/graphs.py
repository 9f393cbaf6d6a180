"""Time the CUDA engine against its own parts: without graphs, kernels, compilation or overlap.

All ways run the same network on the same pixels, from bytes on the host to ranked classes there,
in alternating rounds.
"""

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry

from bench.closed_loop import time_calls
from bench.machine import describe
from bench.rival import make_pixels
from bench.weights import recipe_state
from model import create_model, kernels
from service.engine.classify import Classify
from service.engine.device import Device
from service.engine.engine import Engine, EngineInput
from service.engine.graphs import Capture
from service.metrics import Metrics

RESULTS = Path(__file__).parent / "results"
BASIS = "eager"
IN_FLIGHT = 8  # batches of a call of the ways that keep two in flight

Run = Callable[[Sequence[EngineInput]], Awaitable[object]]


class Way:
    """One way to run a network.

    Attributes:
        batches: of one call.
    """

    def __init__(self, device: Device, run: Run, *, batches: int = 1) -> None:
        self._device, self._run, self.batches = device, run, batches

    async def __call__(self, batch: Sequence[EngineInput]) -> None:
        """Run the batches of one call, as many at a time as the device takes."""
        left = iter(range(self.batches))

        async def in_turn() -> None:
            for _ in left:
                await self._run(batch)

        await asyncio.gather(*(in_turn() for _ in range(self._device.depth)))


async def open_ways(
    name: str, device: Device, dtype: str, buckets: Sequence[int], capture: Capture | None = None
) -> tuple[dict[str, Way], dict[str, float]]:
    """The ways to run a network, and the memory of the device that each took to open, MB."""
    memory: dict[str, float] = {}

    async def engine(way: str, *, fused: bool, compiled: bool) -> Engine:
        kernels.enabled = fused  # what a graph captures is what was enabled then
        model = create_model(name)
        model.load_state_dict(recipe_state(name))
        metrics = Metrics(CollectorRegistry()).add_model(name, "bench", "classify", 1)
        opened = Engine(
            model, device, metrics, dtype=dtype, buckets=buckets, compiled=compiled, capture=capture
        )
        before = _memory_mb(device)
        await opened.load()
        memory[way] = _memory_mb(device) - before
        return opened

    plain = await engine("graph, plain torch", fused=False, compiled=False)
    compiled = await engine("graph, compiled", fused=False, compiled=True)
    fused = await engine("graph, kernels", fused=True, compiled=False)
    return {
        BASIS: Way(device, _eagerly(name, device, dtype)),
        "graph, plain torch": Way(device, plain.run_batch),
        "graph, compiled": Way(device, compiled.run_batch),
        "graph, kernels": Way(device, fused.run_batch),
        "graph, kernels, overlapping": Way(device, fused.run_batch, batches=IN_FLIGHT),
    }, memory


def _eagerly(name: str, device: Device, dtype: str) -> Run:
    model = create_model(name)
    model.load_state_dict(recipe_state(name))
    classify = Classify(model, getattr(torch, dtype)).to(device.torch_device).eval()

    def forward(batch: Sequence[EngineInput]) -> list[torch.Tensor]:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack([item.pixels for item in batch]))
            scores, classes, _ = classify(pixels.to(device.torch_device))
            return [scores.cpu(), classes.cpu()]

    async def run(batch: Sequence[EngineInput]) -> object:
        return await device.run(lambda: forward(batch))

    return run


def _memory_mb(device: Device) -> float:
    if device.torch_device.type != "cuda":
        return 0.0
    return torch.cuda.memory_reserved(device.torch_device) / 2**20


def compare(
    ways: dict[str, Way],
    batch: Sequence[EngineInput],
    *,
    rounds: int,
    seconds: float,
    loop: asyncio.AbstractEventLoop,
) -> list[dict[str, Any]]:
    """Time all ways on one batch in alternating rounds, after one that is thrown away."""

    def seconds_per_batch(way: Way) -> float:
        calls = time_calls(lambda: loop.run_until_complete(way(batch)), seconds)
        return float(np.mean(calls)) / way.batches

    timed = [{key: seconds_per_batch(way) for key, way in ways.items()} for _ in range(rounds + 1)]
    rows = []
    for key in ways:
        ratios = [one[BASIS] / one[key] for one in timed[1:]]
        taken = median(one[key] for one in timed[1:])
        rows.append(
            {
                "way": key,
                "batch": len(batch),
                "ms": 1e3 * taken,
                "images_per_s": len(batch) / taken,
                "ratio": median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
    return rows


def main() -> None:
    """Time the models of the command line, one after another."""
    parser = argparse.ArgumentParser(prog="python -m bench.graphs", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["dat_tiny_224", "dat_pp_tiny_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="per way and round")
    arguments = parser.parse_args()
    device, loop = Device("cuda"), asyncio.new_event_loop()
    for name in arguments.models:
        ways, memory = loop.run_until_complete(
            open_ways(name, device, arguments.dtype, sorted(arguments.batches))
        )
        result = {
            "model": name,
            "machine": describe("bench.graphs", "cuda"),
            "memory_mb": memory,
            "rows": [
                row
                for size in arguments.batches
                for row in compare(
                    ways,
                    [EngineInput(image) for image in make_pixels(name, size)],
                    rounds=arguments.rounds,
                    seconds=arguments.seconds,
                    loop=loop,
                )
            ],
        }
        path = RESULTS / f"graphs-{name}-cuda-{arguments.dtype}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{path.name} written")


if __name__ == "__main__":
    main()
