"""Time the engine on a CPU in float32 and in bfloat16, in torch and in OpenVINO, side by side.

All take the same pixels, with the same weights and threads, each in a process of its own
(`bench.rival`); rounds alternate, and ratios are taken per round. Products of two large matrices,
in either precision, are timed in the same rounds. Detectors follow, an image of 800x1344 at a time.

A CPU without instructions for bfloat16 computes it slowly or not at all: there it is left out.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch

from bench.engine import PRODUCT_SIDE, largest_difference, open_engine, open_product
from bench.harness import RATIO, Row, alternate, options, publish, ratio, table, time_calls
from bench.memory import own_process
from bench.open_engine import OpenEngine
from bench.openvino import open_openvino
from bench.rival import Rival, Timed
from bench.weights import make_detector
from model import VARIANTS
from model.cost import flops
from model.detection import DETECTORS
from model.fused import has_bfloat16
from service import process
from service.engine.device import Device
from service.engine.items import DetectionInput
from service.memory import keep_freed

# What Linux calls them, the fastest first.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
INPUT = (800, 1344)  # of a detector, pixels


def instructions(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The fastest instructions for bfloat16 that this CPU has; `None` where it has none."""
    flags = next(
        (line.split() for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), []
    )
    return next((name for name in INSTRUCTIONS if name in flags), None)


def precisions() -> list[str]:
    """Those that this CPU has instructions for."""
    return ["float32", "bfloat16"] if instructions() and has_bfloat16() else ["float32"]


def open_rivals(name: str, threads: int, max_batch: int, cache: Path) -> dict[str, Rival]:
    """Load all sides, each in its process, by precision and, if not torch, what computes in it."""
    rivals = {}
    for dtype in precisions():
        engine = partial(open_engine, name, "cpu", threads, dtype=dtype, max_batch=max_batch)
        rivals[dtype] = Rival(engine, name, process.ENVIRONMENT)
        if find_spec("openvino") is not None:
            runtime = partial(open_openvino, name, threads, max_batch, cache, dtype)
            rivals[f"openvino {dtype}"] = Rival(runtime, name, process.ENVIRONMENT)
        rivals[f"product {dtype}"] = Rival(partial(open_product, threads, dtype), name)
    return rivals


def compare(
    name: str, rivals: Mapping[str, Rival], batch: int, *, rounds: int, seconds: float
) -> list[Row]:
    """A row for every side that computes the model, after one round that is thrown away."""
    sides: dict[str, Callable[[], Timed]] = {
        side: partial(rival.time, batch, seconds) for side, rival in rivals.items()
    }
    timed = alternate(sides, rounds, unmeasured=1)
    means = {side: [mean(one.durations) for one in of_side] for side, of_side in timed.items()}
    work = batch * flops(VARIANTS[name]) / PRODUCT_SIDE**3  # of multiply-adds alike
    return [
        {
            "model": name,
            "batch": batch,
            "side": side,
            "images_per_s": median(batch / seconds for seconds in of_side),
            **ratio(means["float32"], of_side),
            "share_of_product_rate": ratio(
                [work * seconds for seconds in means[f"product {side.split()[-1]}"]], of_side
            )["ratio"],
            "difference": largest_difference(timed["float32"], timed[side]),
        }
        for side, of_side in means.items()
        if not side.startswith("product")
    ]


_detectors: list[Callable[[], object]] = []  # in the process of a detector, the only one


def _open_detector(name: str, dtype: str, threads: int) -> None:
    process.compute_alone()
    engine = OpenEngine(make_detector(name), Device("cpu", threads), dtype, sizes=[INPUT])
    keep_freed()
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (*INPUT, 3), dtype=torch.uint8, generator=noise).numpy()
    _detectors.append(partial(engine.run, [DetectionInput(pixels, INPUT, (1.0, 1.0))]))


def _time_detector() -> float:
    return mean(time_calls(_detectors[0], 0.0))


def _in_turn(one: ProcessPoolExecutor) -> float:
    return one.submit(_time_detector).result()


def compare_detector(name: str, threads: int, rounds: int) -> list[Row]:
    """A row for each precision."""
    processes = {dtype: own_process(process.ENVIRONMENT) for dtype in precisions()}
    for dtype, one in processes.items():
        one.submit(_open_detector, name, dtype, threads).result()
    taken = alternate(
        {dtype: partial(_in_turn, one) for dtype, one in processes.items()}, rounds, unmeasured=1
    )
    for one in processes.values():
        one.shutdown()
    return [
        {"model": name, "side": dtype, "seconds": median(of_side)}
        | ratio(taken["float32"], of_side)
        for dtype, of_side in taken.items()
    ]


def tables(result: Row) -> str:
    """The tables of `cpu-engine.json`."""
    found = result["instructions"]
    said = (
        f"Instructions for bfloat16: `{found}`."
        if found
        else "This CPU has no instructions for bfloat16, which is left out."
    )
    columns = {
        "model": "{model}",
        "batch": "{batch}",
        "side": "{side}",
        "img/s": "{images_per_s:rate}",
        "to torch in float32 (range)": RATIO,
        "share of a product's rate in that precision": "{share_of_product_rate:.0%}",
        "largest difference of a probability": "{difference:.1e}",
    }
    detectors = {
        "model": "{model}",
        "side": "{side}",
        "seconds": "{seconds:.2f}",
        "to float32 (range)": RATIO,
    }
    return "\n\n".join(
        (said, table(columns, result["classifiers"]), table(detectors, result["detectors"]))
    )


def main() -> None:
    """Time the models of the command line, one after another."""
    chosen = options(
        "bench.cpu",
        __doc__,
        {"models": VARIANTS, "detectors": DETECTORS},
        models=["dat_nano", "dat_tiny_224", "dat_pp_tiny_224"],
        detectors=["retinanet_dat_pp_tiny"],
        batches=[1, 8],
        rounds=5,
        seconds=0.5,
        threads=None,
    )
    rows: list[Row] = []
    for name in chosen.models:
        with TemporaryDirectory() as cache:
            rivals = open_rivals(name, chosen.threads, max(chosen.batches), Path(cache))
            for batch in chosen.batches:
                rows += compare(name, rivals, batch, rounds=chosen.rounds, seconds=chosen.seconds)
            for rival in rivals.values():
                rival.close()
    detectors = [
        row
        for name in chosen.detectors
        for row in compare_detector(name, chosen.threads, chosen.rounds)
    ]
    publish(
        "cpu-engine",
        tables,
        chosen,
        instructions=instructions(),
        classifiers=rows,
        detectors=detectors,
    )


if __name__ == "__main__":
    main()
