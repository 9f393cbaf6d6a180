"""What the attention of DAT saves, measured: parameters, FLOPs, memory and time of its rivals.

DAT-T with its own attention, whose queries share their keys, and with that of Deformable DETR,
whose queries have points of their own but no keys: 16 points, and as many as DAT has keys.

Memory is what the allocator hands out during one forward pass, beside parameters and input: at
its most, as in inference; and what is still held at the end of a pass that autograd records, as
in training. Times alternate in rounds; the ratio to DAT is taken per round.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.harness import (
    RATIO,
    Row,
    alternate,
    describe,
    options,
    publish,
    ratio,
    table,
    time_calls,
)
from model import create_model
from model.cost import cost

MODELS = ("dat_tiny_224", "dat_tiny_224_ddetr", "dat_tiny_224_ddetr_equal")


class Memory(NamedTuple):
    """What a forward pass takes from the allocator.

    Attributes:
        peak: bytes, at most at one time.
        held: bytes, at its end.
    """

    peak: int
    held: int


def measure_memory(forward: Callable[[], object], device: torch.device) -> Memory:
    """Measure a forward pass whose parameters and inputs are there already."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = forward()
        torch.cuda.synchronize()
        after, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del kept
        return Memory(most - before, after - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = forward()
    del kept
    total = peak = 0
    for change in _allocations(profiled):
        total += change
        peak = max(peak, total)
    return Memory(peak, total)


def _allocations(profiled: profile) -> list[int]:
    """Bytes that the allocator of the CPU handed out (or, negative, took back), in order."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def measure_both(module: nn.Module, images: Tensor) -> tuple[Memory, Memory]:
    """Memory of a forward pass in inference, and of one that autograd records."""
    forward = partial(module, images)
    module.train()
    forward()  # what only a first call allocates
    training = measure_memory(forward, images.device)
    module.eval()
    with torch.inference_mode():
        inference = measure_memory(forward, images.device)
    return inference, training


def compare(
    networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int, seconds: float
) -> list[Row]:
    """Measure memory, then time in alternating rounds; ratios are to the first network."""
    memory = {name: measure_both(network, images) for name, network in networks.items()}

    def time_passes(network: nn.Module) -> float:
        def compute() -> None:
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize()

        with torch.inference_mode():
            return mean(time_calls(compute, seconds))

    sides = {name: partial(time_passes, network) for name, network in networks.items()}
    taken = alternate(sides, rounds, unmeasured=1)
    first, *_ = taken.values()
    return [
        {
            "name": name,
            "inference_peak_bytes": inference.peak,
            "training_peak_bytes": training.peak,
            "training_held_bytes": training.held,
            "ms": 1e3 * median(taken[name]),
            **ratio(taken[name], first),
        }
        for name, (inference, training) in memory.items()
    ]


def tables(result: Row) -> str:
    """The table of one `attention_cost-*.json`."""
    columns = {
        "model": "{name}",
        "million parameters": "{parameters:/1e6 .2f}",
        "GFLOPs": "{flops:/1e9 .3f}",
        "inference peak MB": "{inference_peak_bytes:/1e6 .1f}",
        "training held MB": "{training_held_bytes:/1e6 .1f}",
        "training peak MB": "{training_peak_bytes:/1e6 .1f}",
        "ms": "{ms:.2f}",
        "time / DAT (range)": RATIO,
    }
    return table(columns, result["models"])


def main() -> None:
    """Compare the models."""
    chosen = options(
        "bench.attention_cost",
        __doc__,
        rounds=7,
        seconds=0.1,
        threads=None,
        device="cpu",
    )
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    networks = {name: create_model(name).to(chosen.device) for name in MODELS}
    images = torch.randn(1, 3, 224, 224, device=chosen.device)
    rows = compare(networks, images, rounds=chosen.rounds, seconds=chosen.seconds)
    result = {
        "device": chosen.device,
        "batch": 1,
        "machine": describe("bench.attention_cost", chosen.device),
        "rounds": chosen.rounds,
        "models": [row | vars(cost(networks[row["name"]])) for row in rows],
    }
    publish(f"attention_cost-{chosen.device}", tables, result)


if __name__ == "__main__":
    main()
