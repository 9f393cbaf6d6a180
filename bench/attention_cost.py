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
from itertools import accumulate
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


def measure_memory(forward: Callable[[], object]) -> Memory:
    """Measure a forward pass on the CPU whose parameters and inputs are there already."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = forward()
    del kept
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    # What the allocator handed out or, negative, took back.
    totals = list(accumulate(event["args"]["Bytes"] for event in events))
    return Memory(max(totals), totals[-1])


def measure_both(network: nn.Module, images: Tensor) -> tuple[Memory, Memory]:
    """Memory of a forward pass in inference, and of one that autograd records."""
    forward = partial(network, images)
    network.train()
    forward()  # what only a first call allocates
    training = measure_memory(forward)
    network.eval()
    with torch.inference_mode():
        inference = measure_memory(forward)
    return inference, training


def compare(
    networks: Mapping[str, nn.Module], images: Tensor, *, rounds: int, seconds: float
) -> list[Row]:
    """Measure memory, then time in alternating rounds; ratios are to the first network."""
    memory = {name: measure_both(network, images) for name, network in networks.items()}

    def time_passes(network: nn.Module) -> float:
        with torch.inference_mode():
            return mean(time_calls(partial(network, images), seconds))

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
    """The table of `attention_cost-cpu.json`."""
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
    chosen = options("bench.attention_cost", __doc__, rounds=7, seconds=0.1, threads=None)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    networks = {name: create_model(name) for name in MODELS}
    images = torch.randn(1, 3, 224, 224)
    rows = compare(networks, images, rounds=chosen.rounds, seconds=chosen.seconds)
    models = [row | vars(cost(networks[row["name"]])) for row in rows]
    publish("attention_cost-cpu", tables, chosen, models=models)


if __name__ == "__main__":
    main()
