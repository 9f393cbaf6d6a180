"""Measure how the cost of an engine grows: with batch, resolution and models loaded.

And whether memory comes back after a peak of the whole server. Sides of a ratio run in alternating
rounds, as in `bench.engine`; what is said of memory was measured in processes of its own.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from math import prod
from statistics import median

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
from bench.memory import (
    IN_USE_ALONE,
    in_own_process,
    in_use,
    most_taken,
    peak,
    reset_peak,
    resident,
)
from bench.open_engine import OpenEngine
from bench.running_server import running_server
from bench.weights import recipe_checkpoint, recipe_state
from model import VARIANTS, load_model
from model.checkpoint import Checkpoint
from model.cost import flops
from service import process
from service.engine.device import Device
from service.engine.items import ClassificationInput
from service.memory import keep_freed
from tests import recipe

SIZES = (224, 288, 384, 448)  # pixels a side
MODELS = (1, 2, 4, 8)
STORMS = 2
UPLOADS = {"concurrency": 64, "height": 3000, "width": 4000}  # 12 MP each
STORM_TIMEOUT_S = 300
REST_S = 11.0  # in which a quiet server gives memory back


def open_device(threads: int) -> Device:
    """A device for a process that computes on nothing else."""
    device = Device("cpu", threads)
    process.compute_alone()
    return device


def load(
    weights: Checkpoint, device: Device, size: int = SIZES[0], buckets: Sequence[int] = (1,)
) -> OpenEngine:
    """Load an engine for images of `size` pixels a side; weights are called after their model."""
    network = load_model(weights, weights.path.stem, (size, size))
    return OpenEngine(network, device, "float32", buckets=buckets)


def make_batch(batch: int, size: int = SIZES[0]) -> list[ClassificationInput]:
    """Test pictures."""
    return [ClassificationInput(recipe.image(0, index, size, size)) for index in range(batch)]


def durations(calls: Sequence[Callable[[], object]], *, rounds: int, seconds: float) -> list[Row]:
    """Median durations of all calls, and their ratios to the first; one round is thrown away."""
    sides = {
        index: lambda call=call: median(time_calls(call, seconds))
        for index, call in enumerate(calls)
    }
    taken = alternate(sides, rounds, unmeasured=1)
    return [{"ms": 1e3 * median(of), **ratio(of, taken[0])} for of in taken.values()]


def grow_batch(name: str, device: Device, memory: list[int], chosen: Namespace) -> Row:
    """Time of batches."""
    engine = load(recipe_checkpoint(name), device, buckets=chosen.batches)
    calls = [partial(engine.run, make_batch(batch)) for batch in chosen.batches]
    timed = durations(calls, rounds=chosen.rounds, seconds=chosen.seconds)
    return {
        "rows": [
            {"batch": batch, "ms": row["ms"], "memory_bytes": taken}
            for batch, row, taken in zip(chosen.batches, timed, memory, strict=True)
        ]
    }


def grow_size(name: str, device: Device, memory: list[int], chosen: Namespace) -> list[Row]:
    """Time of one image at each resolution, beside its FLOPs."""
    weights = recipe_checkpoint(name)
    calls = [partial(load(weights, device, size).run, make_batch(1, size)) for size in SIZES]
    timed = durations(calls, rounds=chosen.rounds, seconds=chosen.seconds)
    return [
        {
            "size": size,
            "flops": flops(VARIANTS[name].resized((size, size))),
            "memory_bytes": taken,
            **row,
        }
        for size, row, taken in zip(SIZES, timed, memory, strict=True)
    ]


def grow_models(name: str, chosen: Namespace) -> list[Row]:
    """Memory and loading time of copies of one model on a device, and images in turn."""
    device, weights = open_device(chosen.threads), recipe_checkpoint(name)
    engines, seconds, memory = [], [], []

    def load_one() -> None:
        engines.append(load(weights, device))

    before = in_use()
    for _ in range(MODELS[-1]):
        seconds += time_calls(load_one, 0)
        memory.append(in_use() - before)
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
            **row,
        }
        for count, row in zip(MODELS, timed, strict=True)
    ]


def memory_of_work(name: str, threads: int, shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Most memory that a batch takes beside a loaded engine, for each `(batch, size)`; bytes."""
    device, weights = open_device(threads), recipe_checkpoint(name)
    return [
        most_taken(partial(load(weights, device, size, (batch,)).run, make_batch(batch, size)))
        for batch, size in shapes
    ]


def return_after_storms(name: str, threads: int) -> list[Row]:
    """Resident memory of the server, before, at and after storms of large uploads.

    Raises:
        RuntimeError: an upload was not answered.
    """
    with running_server(
        {"model": recipe_state(name)},
        DAT_MODEL__NAME=name,
        DAT_ENGINE__DEVICE="cpu",
        DAT_ENGINE__THREADS=threads,
        DAT_LIMITS__DEFAULT_TIMEOUT_S=STORM_TIMEOUT_S,
        # By default it would refuse half of them.
        DAT_LIMITS__MAX_PIXELS_IN_FLIGHT=prod(UPLOADS.values()),
    ) as server:
        rows = [{"when": "ready", "bytes": resident(server.pid)}]

        def note(when: str) -> None:
            rows.append({"when": when, "bytes": resident(server.pid)})

        time.sleep(REST_S)
        note(f"{REST_S:.0f} s later")
        for number in range(1, STORMS + 1):
            reset_peak(server.pid)
            # So short that nobody asks twice.
            once = {"seconds": 0.05, "warmup": 0, "leave_after": STORM_TIMEOUT_S}
            statuses = server.load("http", **UPLOADS, **once)["statuses"]
            if set(statuses) != {"200"}:
                raise RuntimeError(f"the server answered {statuses}")
            rows.append({"when": f"peak of storm {number}", "bytes": peak(server.pid)})
            note(f"end of storm {number}")
            time.sleep(REST_S)
            note(f"{REST_S:.0f} s later")
    return rows


def measure(name: str, chosen: Namespace) -> Row:
    """All that grows, of one model."""
    batches, threads = chosen.batches, chosen.threads
    shapes = [(batch, SIZES[0]) for batch in batches] + [(1, size) for size in SIZES]
    memory = in_own_process(IN_USE_ALONE, memory_of_work, name, threads, shapes)
    keep_freed()
    device = open_device(threads)
    timed = {
        "batch": grow_batch(name, device, memory[: len(batches)], chosen),
        "size": grow_size(name, device, memory[len(batches) :], chosen),
    }
    # Its threads, even idle, would slow down the next model.
    device.close()
    return {
        **timed,
        "models": in_own_process({}, grow_models, name, chosen),
        "server_memory": return_after_storms(name, threads),
    }


def tables(result: Row) -> str:
    """The tables of one `growth-*.json`."""
    memory = "{memory_bytes:/1e6 .1f}"
    batches = {
        "batch": "{batch}",
        "ms": "{ms:.1f}",
        "ms an image": "{ms_each:.1f}",
        "memory MB": memory,
        "MB an image": "{bytes_each:/1e6 .1f}",
    }
    sizes = {
        "input, batch 1": "{size}x{size}",
        "GFLOPs": "{flops:/1e9 .2f}",
        "ms": "{ms:.1f}",
        "time / first (range)": RATIO,
        "FLOPs / first": "{flops_ratio:.2f}",
        "memory MB": memory,
    }
    models = {
        "models": "{models}",
        "memory MB": memory,
        "MB for each model more": "{bytes_more:/1e6 .1f}",
        "s to load one": "{load_s:.1f}",
        "ms, batch 1, in turn": "{ms:.1f}",
        "time / one model (range)": RATIO,
    }
    by_batch, by_size, by_models = result["batch"]["rows"], result["size"], result["models"]
    for row in by_batch:
        row |= {"ms_each": row["ms"] / row["batch"]}
        row |= {"bytes_each": row["memory_bytes"] / row["batch"]}
    for row in by_size:
        row |= {"flops_ratio": row["flops"] / by_size[0]["flops"]}
    for row in by_models:
        more = row["memory_bytes"] - by_models[0]["memory_bytes"]
        row |= {"bytes_more": more / max(1, row["models"] - 1)}
    in_server = table({"server": "{when}", "MB": "{bytes:/1e6 .1f}"}, result["server_memory"])
    shown = (table(batches, by_batch), table(sizes, by_size), table(models, by_models), in_server)
    return "\n\n".join(shown)


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
    )
    for name in chosen.models:
        publish(f"growth-{name}-cpu-float32", tables, chosen, **measure(name, chosen))


if __name__ == "__main__":
    main()
