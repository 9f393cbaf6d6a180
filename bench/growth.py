"""Measure how the cost of an engine grows: with batch, resolution, explained images and models.

And whether memory comes back after a peak, of an engine and of the whole server. Sides of a ratio
run in alternating rounds, as in `bench.engine`; what is said of memory was measured in processes
of its own.
"""

import asyncio
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.harness import in_turn, options, publish, ratio, time_calls
from bench.load import HttpClient, make_jpeg
from bench.machine import describe
from bench.memory import IN_USE_ALONE, METERS, in_own_process, peak, reset_peak, resident
from bench.open_engine import OpenEngine
from bench.running_server import RunningServer, running_server
from bench.tables import RATIO, Row, table
from bench.weights import recipe_checkpoint, recipe_state
from model import VARIANTS, load_model
from model.checkpoint import Checkpoint
from model.cost import flops
from model.transforms import Preprocessing
from service import process
from service.engine.device import Device
from service.engine.items import ClassificationInput, Wanted
from service.memory import keep_freed
from service.tasks import points
from tests import recipe

SIZES = (224, 288, 384, 448)  # pixels a side
EXPLAINED = (0, 1, 4, 8)  # of a batch of 8
MODELS = (1, 2, 4, 8)
KNEE = 1.1  # past it an image costs at most this much of what it costs in the largest batch
PEAKS = 2
CALLS = 4  # of one kind around a peak
UPLOAD = (3000, 4000)  # pixels, 12 MP
UPLOADS = 64  # in flight
PICTURES = 4  # different ones among them
STORM_TIMEOUT_S = 300
REST_S = 11.0  # in which a quiet server gives memory back


@dataclass(frozen=True)
class Setup:
    """What is measured, and on what."""

    name: str
    device: str
    dtype: str
    threads: int

    def open_device(self) -> Device:
        """The device, in a process that computes on nothing else."""
        device = Device(self.device, self.threads)
        process.compute_alone()
        return device

    def load(
        self, device: Device, weights: Checkpoint, size: int = SIZES[0], **options: Any
    ) -> OpenEngine:
        """Load an engine for images of `size` pixels a side."""
        network = load_model(weights, self.name, (size, size))
        return OpenEngine(network, device, self.dtype, **options)


def make_batch(
    batch: int, size: int = SIZES[0], *, explained: int = 0
) -> list[ClassificationInput]:
    """Test pictures, the first of them to be explained."""
    return [
        ClassificationInput(recipe.image(0, index, size, size), Wanted(points=index < explained))
        for index in range(batch)
    ]


def durations(calls: Sequence[Callable[[], object]], *, rounds: int, seconds: float) -> list[Row]:
    """Median durations of all calls, and their ratios to the first; one round is thrown away."""
    sides = {
        index: lambda call=call: median(time_calls(call, seconds))
        for index, call in enumerate(calls)
    }
    _, *timed = in_turn(sides, rounds + 1)
    taken = [[one[index] for one in timed] for index in sides]
    return [{"ms": 1e3 * median(of_call), **ratio(of_call, taken[0])} for of_call in taken]


def line_past_the_knee(batches: Sequence[int], costs: Sequence[float]) -> Row:
    """The straight line through the costs of batches past the knee, and how straight they are.

    It is the line that is closest to the costs in proportion to them: a small batch counts as
    much as a large one.

    Args:
        batches: ascending.
        costs: of each of them, in any unit.

    Returns:
        The first batch past the knee, what an image costs there and what a batch costs beside
        its images, in the unit of the costs; R², and the largest distance from the line,
        relative to it.
    """
    x, y = np.array(batches, float), np.array(costs, float)
    cheap = y / x <= KNEE * y[-1] / x[-1]
    knee = next(index for index in range(len(x)) if cheap[index:].all())
    first = min(knee, len(x) - 3)  # two points are always on a line
    x, y = x[first:], y[first:]
    slope, fixed = np.polyfit(x, y, 1, w=1 / y)
    line = fixed + slope * x
    return {
        "from_batch": batches[first],
        "of_an_image": float(slope),
        "of_a_batch": float(fixed),
        "r2": float(1 - ((y - line) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
        "largest_deviation": float(np.abs(y / line - 1).max()),
    }


def grow_batch(setup: Setup, device: Device, memory: list[int], chosen: Namespace) -> Row:
    """Time of batches."""
    batches = chosen.batches
    engine = setup.load(device, recipe_checkpoint(setup.name), buckets=batches)
    calls = [partial(engine.run, make_batch(batch)) for batch in batches]
    timed = durations(calls, rounds=chosen.rounds, seconds=chosen.seconds)
    ms = [row["ms"] for row in timed]
    return {
        "rows": [
            {"batch": batch, "ms": ms[index], "memory_bytes": memory[index]}
            for index, batch in enumerate(batches)
        ],
        "time_line": line_past_the_knee(batches, ms),
        "memory_line": line_past_the_knee(batches, memory),
    }


def grow_size(setup: Setup, device: Device, memory: list[int], chosen: Namespace) -> list[Row]:
    """Time of one image at each resolution, beside its FLOPs."""
    weights = recipe_checkpoint(setup.name)
    engines = [setup.load(device, weights, size, buckets=(1,)) for size in SIZES]
    calls = [
        partial(engine.run, make_batch(1, size))
        for engine, size in zip(engines, SIZES, strict=True)
    ]
    timed = durations(calls, rounds=chosen.rounds, seconds=chosen.seconds)
    return [
        {
            "size": size,
            "flops": flops(VARIANTS[setup.name].resized((size, size))),
            "memory_bytes": memory[index],
            **timed[index],
        }
        for index, size in enumerate(SIZES)
    ]


def grow_explained(setup: Setup, device: Device, chosen: Namespace) -> Row:
    """Time of a batch by how many of its images are explained, and of points made for an image."""
    engine = setup.load(device, recipe_checkpoint(setup.name), max_batch=EXPLAINED[-1])
    batches = [make_batch(EXPLAINED[-1], explained=count) for count in EXPLAINED]
    calls = [partial(engine.run, batch) for batch in batches]
    # Differences are small here: many short rounds.
    timed = durations(calls, rounds=3 * chosen.rounds, seconds=chosen.seconds / 3)
    locations = engine.run(batches[-1])[0].sampling_locations
    config = VARIANTS[setup.name]
    pixel_map = Preprocessing.of(config).pixel_map(640, 480)
    make_points = partial(points.explained, config, config.image_size, locations, pixel_map)
    return {
        "rows": [
            {"batch": EXPLAINED[-1], "explained": count, **timed[index]}
            for index, count in enumerate(EXPLAINED)
        ],
        "points_ms": 1e3 * median(time_calls(make_points, chosen.seconds)),
    }


def grow_models(setup: Setup, chosen: Namespace) -> list[Row]:
    """Memory and loading time of copies of one model on a device, and images in turn."""
    device = setup.open_device()
    weights = recipe_checkpoint(setup.name)
    meter = METERS[setup.device]
    before = meter.in_use()
    engines: list[OpenEngine] = []
    seconds, memory = [], []
    for _ in range(MODELS[-1]):
        began = time.perf_counter()
        engines.append(setup.load(device, weights))
        seconds.append(time.perf_counter() - began)
        memory.append(meter.in_use() - before)
    keep_freed()
    image = make_batch(1)
    turns = [cycle(engines[:count]) for count in MODELS]
    calls = [partial(lambda turn: next(turn).run(image), turn) for turn in turns]
    timed = durations(calls, rounds=chosen.rounds, seconds=chosen.seconds)
    return [
        {
            "models": count,
            "memory_bytes": memory[count - 1],
            "load_s": median(seconds[:count]),
            **timed[index],
        }
        for index, count in enumerate(MODELS)
    ]


def memory_of_work(setup: Setup, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Most memory that a batch takes beside a loaded engine, for each `(batch, size)`; bytes."""
    device, weights = setup.open_device(), recipe_checkpoint(setup.name)
    measure = _graph_memory if setup.device == "cuda" else _heap_memory
    return [
        measure(
            partial(setup.load, device, weights, size, buckets=(batch,)), make_batch(batch, size)
        )
        for batch, size in shapes
    ]


def _heap_memory(load: Callable[[], OpenEngine], batch: list[ClassificationInput]) -> int:
    engine = load()
    engine.run(batch)
    before = METERS["cpu"].in_use()
    reset_peak()
    engine.run(batch)
    return peak() - before


def _graph_memory(load: Callable[[], OpenEngine], batch: list[ClassificationInput]) -> int:
    # A graph has its memory from its capture on.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = load()
    engine.run(batch)
    loaded = (*engine.network.parameters(), *engine.network.buffers())
    return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in loaded)


def return_after_peaks(setup: Setup, batch: int) -> list[Row]:
    """Memory with one engine loaded, before, at and after peaks of its work."""
    meter = METERS[setup.device]
    engine = setup.load(setup.open_device(), recipe_checkpoint(setup.name), buckets=(1, batch))
    keep_freed()
    small, large = make_batch(1), make_batch(batch, explained=batch)
    rows = [{"when": "loaded, given back", "bytes": meter.in_use()}]
    for number in range(1, PEAKS + 1):
        meter.reset_peak()
        for _ in range(CALLS):
            engine.run(large)
        rows.append({"when": f"peak {number}, batches of {batch}", "bytes": meter.peak()})
        for _ in range(CALLS):
            engine.run(small)
        rows.append({"when": "then batches of 1", "bytes": meter.now()})
        rows.append({"when": "given back", "bytes": meter.in_use()})
    return rows


def return_after_storms(setup: Setup) -> list[Row]:
    """Resident memory of the server, before, at and after storms of large uploads."""
    pictures = [make_jpeg(*UPLOAD, quality=90, seed=seed) for seed in range(PICTURES)]
    with running_server(
        {"model": recipe_state(setup.name)},
        DAT_MODEL__NAME=setup.name,
        DAT_ENGINE__DEVICE=setup.device,
        DAT_ENGINE__DTYPE=setup.dtype,
        DAT_ENGINE__THREADS=setup.threads,
        DAT_LIMITS__DEFAULT_TIMEOUT_S=STORM_TIMEOUT_S,
    ) as server:
        rows = [{"when": "ready", "bytes": resident(server.pid)}]
        time.sleep(REST_S)
        rows.append({"when": f"{REST_S:.0f} s later", "bytes": resident(server.pid)})
        for number in range(1, PEAKS + 1):
            reset_peak(server.pid)
            asyncio.run(_storm(server, pictures))
            rows.append({"when": f"peak of storm {number}", "bytes": peak(server.pid)})
            rows.append({"when": f"end of storm {number}", "bytes": resident(server.pid)})
            time.sleep(REST_S)
            rows.append({"when": f"{REST_S:.0f} s later", "bytes": resident(server.pid)})
    return rows


async def _storm(server: RunningServer, pictures: list[bytes]) -> None:
    """Send all uploads at once.

    Raises:
        RuntimeError: one was not answered.
    """
    client = HttpClient(server.ports["http"], "/v1/classify", STORM_TIMEOUT_S)
    uploads = cycle(pictures)
    replies = await asyncio.gather(*(client.send(next(uploads)) for _ in range(UPLOADS)))
    if failed := [reply.status for reply in replies if not reply.ok]:
        raise RuntimeError(f"the server answered {failed}")


def measure(setup: Setup, chosen: Namespace) -> Row:
    """All that grows, of one model."""
    batches = chosen.batches
    shapes = [(batch, SIZES[0]) for batch in batches] + [(1, size) for size in SIZES]
    memory = in_own_process(IN_USE_ALONE, memory_of_work, setup, shapes)
    keep_freed()
    device = setup.open_device()
    of_batches, of_sizes = memory[: len(batches)], memory[len(batches) :]
    timed = {
        "batch": grow_batch(setup, device, of_batches, chosen),
        "size": grow_size(setup, device, of_sizes, chosen),
        "explained": grow_explained(setup, device, chosen),
    }
    # Its threads, even idle, would slow down the next model.
    device.close()
    return {
        "model": setup.name,
        "device": setup.device,
        "dtype": setup.dtype,
        "machine": describe("bench.growth", setup.device, setup.threads),
        "rounds": chosen.rounds,
        **timed,
        "models": in_own_process({}, grow_models, setup, chosen),
        "engine_memory": in_own_process({}, return_after_peaks, setup, batches[-1]),
        "server_memory": return_after_storms(setup),
    }


def tables(result: Row) -> str:
    """The tables of one `growth-*.json`."""
    by_batch, by_size, explained = result["batch"], result["size"], result["explained"]
    batches = {
        "batch": "{batch}",
        "ms": "{ms:.1f}",
        "ms an image": "{ms_each:.1f}",
        "memory MB": MB,
        "MB an image": "{bytes_each:/1e6 .1f}",
    }
    sizes = {
        "input, batch 1": "{size}x{size}",
        "GFLOPs": "{flops:/1e9 .2f}",
        "ms": "{ms:.1f}",
        "time / first (range)": RATIO,
        "FLOPs / first": "{flops_ratio:.2f}",
        "memory MB": MB,
    }
    of_explained = {
        "explained": "{explained} of {batch}",
        "ms": "{ms:.1f}",
        "time / none explained (range)": RATIO.replace(".2f", ".3f"),
    }
    models = {
        "models": "{models}",
        "memory MB": MB,
        "MB for each model more": "{bytes_more:/1e6 .1f}",
        "s to load one": "{load_s:.1f}",
        "ms, batch 1, in turn": "{ms:.1f}",
        "time / one model (range)": RATIO,
    }
    first, alone = by_size[0], result["models"][0]
    of_batches = (
        row | {"ms_each": row["ms"] / n, "bytes_each": row["memory_bytes"] / n}
        for row in by_batch["rows"]
        for n in [row["batch"]]
    )
    of_sizes = (row | {"flops_ratio": row["flops"] / first["flops"]} for row in by_size)
    of_models = (
        row | {"bytes_more": (row["memory_bytes"] - alone["memory_bytes"]) / max(1, more)}
        for row in result["models"]
        for more in [row["models"] - 1]
    )
    return "\n\n".join(
        (
            table(batches, of_batches),
            f"Time: {_in_words(by_batch['time_line'], 1, 'ms')}.",
            f"Memory: {_in_words(by_batch['memory_line'], 1e6, 'MB')}.",
            table(sizes, of_sizes),
            table(of_explained, explained["rows"]),
            f"To make the points of one image from them: {explained['points_ms']:.2f} ms.",
            table(models, of_models),
            *(
                table({whose: "{when}", "MB": "{bytes:/1e6 .1f}"}, result[f"{whose}_memory"])
                for whose in ("engine", "server")
            ),
        )
    )


MB = "{memory_bytes:/1e6 .1f}"


def _in_words(line: Row, unit: float, name: str) -> str:
    return (
        f"from batch {line['from_batch']} on {line['of_an_image'] / unit:.1f} {name} an image and "
        f"{line['of_a_batch'] / unit:.1f} {name} a batch, at most {line['largest_deviation']:.1%} "
        f"off that line (R² {line['r2']:.4f})"
    )


def main() -> None:
    """Measure the models of the command line, one after another; batches ascend."""
    chosen = options(
        "bench.growth",
        __doc__,
        {"models": VARIANTS},
        models=["dat_tiny_224", "dat_pp_tiny_224"],
        batches=[1, 2, 4, 8, 16, 32],
        rounds=5,
        seconds=0.3,
        threads=None,
        device="cpu",
        dtype="float32",
    )
    for name in chosen.models:
        setup = Setup(name, chosen.device, chosen.dtype, chosen.threads)
        publish(f"growth-{name}-{chosen.device}-{chosen.dtype}", tables, measure(setup, chosen))


if __name__ == "__main__":
    main()
