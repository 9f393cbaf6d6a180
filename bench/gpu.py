"""All that needs a CUDA device, in two parts of at most six minutes each; see `bench/gpu.sh`.

A part runs its steps one after another, some of them side by side, each in a process and under a
time limit. A step that fails stops none of those after it and is named at the end.

Environment: `DEVICE=cpu` rehearses on small models, `OUT` is the folder for results, `MODELS`
names other models for the checks.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from bench.findings import bound, verdict
from bench.harness import Row, table
from bench.steps import ROOT, Outcome, Part, Step

PART_S = 350.0  # of the six minutes; the rest is for the start
# A rehearsal may be beside others on a small machine.
PATIENCE = {"cpu": 5.0, "cuda": 1.0}


def module(name: str, limit_s: float, /, *command: object, **environment: str) -> Step:
    """A step that runs a module of Python."""
    return Step(name, limit_s, (sys.executable, "-m", *map(str, command)), environment)


CHECKED = {
    "cpu": ("dat_nano", "mask_rcnn_dat_nano"),
    "cuda": (
        *("dat_tiny_224", "dat_small_224", "dat_base_224", "dat_base_384", "dat_tiny_224_ddetr"),
        *("dat_pp_tiny_224", "dat_pp_small_224", "dat_pp_base_224", "dat_pp_base_384"),
        *("dat_nano", "mask_rcnn_dat_nano"),
        *("retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny", "cascade_mask_rcnn_dat_pp_tiny"),
    ),
}
# For each measurement a limit, seconds, its module, and the options on a GPU and in a rehearsal.
TIMES = {
    "times": (
        175,
        "bench.graphs",
        "--models dat_tiny_224 dat_pp_tiny_224 dat_nano --batches 1 8 32 64 128",
        "--models dat_nano --batches 1 --seconds 0",
    )
}
SECOND = {
    "server": (
        120,
        "bench.server",
        "--max-batch 64 --concurrency 64 --rounds 2 --seconds 4 --engine-seconds 2",
        "--model dat_nano --concurrency 2 --rounds 1 --seconds 1 --warmup 0 --engine-seconds 0",
    ),
    "kernels": (80, "bench.kernels", "--batches 32", "--dtype float32"),
    "detectors": (
        60,
        "bench.graphs",
        "--ways engine --models retinanet_dat_pp_tiny mask_rcnn_dat_pp_tiny --batches 1 8",
        "--ways engine --models mask_rcnn_dat_nano --batches 1 --seconds 0",
    ),
    "hottest": (60, "bench.hottest", "", "--models dat_nano --batch 2"),
    "compile": (
        120,
        "bench.graphs",
        "--ways 'graph, compiled kernels' 'graph, compiled' --batches 64 1",
        "--ways 'graph, compiled kernels' --models dat_nano --batches 1 --seconds 0",
    ),
}


def first(device: str, checked: Sequence[str]) -> list[list[Step]]:
    """What is right, then how fast it is; the steps of one list run side by side."""
    checks = [
        module(f"check-{name}", 160, "tests.gpu.check", name, device, OMP_NUM_THREADS="2")
        for name in checked
    ]
    return [[_environment(device)], [*checks, _tests(device)], *_measurements(TIMES, device)]


def second(device: str) -> list[list[Step]]:
    """The server, the kernels one by one, detectors, and compilation around the kernels."""
    return [[_environment(device)], *_measurements(SECOND, device)]


def _measurements(
    commands: Mapping[str, tuple[float, str, str, str]], device: str
) -> Iterator[list[Step]]:
    for name, (limit_s, of, on_gpu, on_cpu) in commands.items():
        chosen = shlex.split(on_gpu if device == "cuda" else on_cpu)
        variables = {"TRITON_INTERPRET": "1"} if (device, name) == ("cpu", "kernels") else {}
        yield [module(name, limit_s, of, "--device", device, *chosen, **variables)]


def _environment(device: str) -> Step:
    return module("environment", 40, "bench.gpu", "environment", device)


def _tests(device: str) -> Step:
    """The tests marked `gpu`, in several processes; a rehearsal only collects them all."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    kernels = ROOT / "tests" / "model" / "kernels"  # which marks its tests itself
    chosen = [
        str(file.relative_to(ROOT))
        for file in files
        if file.is_relative_to(kernels) or "mark.gpu" in file.read_text("utf-8")
    ]
    how = ("-m", "gpu", "-n", "8", "--dist", "worksteal", "--timeout", "100", "--tb", "short")
    plugins = ("xdist.plugin", "pytest_asyncio.plugin", "pytest_timeout", "no:cacheprovider")
    words = [word for plugin in plugins for word in ("-p", plugin)]
    return module(
        "tests",
        170,
        *("pytest", "-q", "-rfE", *chosen, *words),
        *(how if device == "cuda" else ("--collect-only",)),
        # Warnings of other plugins would be errors, and they may not know this pytest. Plain
        # torch in float32 is the reference of kernels, and in TF32 it is none.
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        NVIDIA_TF32_OVERRIDE="0",
    )


def environment(device: str) -> None:
    """Print what the machine is, as one JSON object behind what may matter beside it."""
    import numpy  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import triton  # noqa: PLC0415

    from bench.harness import describe  # noqa: PLC0415
    from service.engine.gpu import kernels_on  # noqa: PLC0415

    for command in ("nvidia-smi", "free", "nproc"):
        if shutil.which(command):
            subprocess.run([command], check=False)
    driver = "none"
    if device == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    machine: dict[str, Any] = describe("bench.gpu", device) | {
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or "none",
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "tools": ", ".join(filter(shutil.which, ("gcc", "git", "nvcc"))),
        "kernels": kernels_on(torch.device("cuda:0" if device == "cuda" else device)),
    }
    print(json.dumps({"machine": machine}))


def choose(groups: list[list[Step]], names: Sequence[str]) -> list[list[Step]]:
    """The steps of some names, or that begin with one of them; all if there are none.

    Raises:
        ValueError: no step has such a name.
    """
    known = [step.name for group in groups for step in group]
    for name in names:
        if not any(_is(step, name) for step in known):
            raise ValueError(f"no step is called {name}; there are {', '.join(known)}")
    wanted = ("environment", *names) if names else known
    chosen = [
        [step for step in group if any(_is(step.name, w) for w in wanted)] for group in groups
    ]
    return [group for group in chosen if group]


def _is(step: str, name: str) -> bool:
    return step == name or step.startswith(f"{name}-")


def run(part: str, groups: list[list[Step]], folder: Path, *, patience: float) -> bool:
    """Run the steps of a part, write its results as they come, and print what was found.

    Returns:
        Whether all steps ended well.
    """
    began = monotonic()
    machine: dict[str, Any] = {}
    outcomes: list[Outcome] = []
    log = folder / f"gpu-{part}.log"
    with log.open("w", encoding="utf-8") as file:
        running = Part(file, PART_S, folder, patience=patience)
        for group in groups:
            print(f"== {monotonic() - began:.0f} s: {', '.join(step.name for step in group)}")
            came = running.run(group)
            outcomes += came
            machine |= {
                k: v for one in came for row in one.rows for k, v in row.get("machine", {}).items()
            }
            result = {
                "part": part,
                "machine": machine | {"command": f"bash bench/gpu.sh {part}"},
                "seconds": round(monotonic() - began, 1),
                "steps": [vars(outcome) for outcome in outcomes],
            }
            path = folder / f"gpu-{part}-{_slug(machine.get('gpu', 'unknown'))}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            for outcome in came:
                print("\n".join(_lines(outcome)), flush=True)
    bad = [outcome for outcome in outcomes if outcome.ended != "ok"]
    for outcome in bad:
        print(f"{outcome.name} {outcome.ended}; see the lines '{outcome.name}: ' of {log}")
    return not bad


def _slug(card: str) -> str:
    """The name of a card as part of the name of a file."""
    return "cpu" if card == "none" else re.sub(r"[^a-z0-9]+", "-", card.lower())


def _lines(outcome: Outcome) -> Iterator[str]:
    yield f"{outcome.name}: {outcome.ended}, {outcome.seconds} s"
    for row in outcome.rows:
        if "what" in row:
            judged = f"  ({bound(row)}: {verdict(row)})" if verdict(row) else ""
            yield f"  {row['model']}, {row['what']}: {row['figure']:.4g}{judged}"
        elif "machine" not in row:
            yield "  " + ", ".join(f"{key} {value}" for key, value in row.items())[:150]


def tables(result: Row) -> str:
    """The tables of one `gpu-*.json`: what was found, times, and where the time goes."""
    machine, steps = result["machine"], result["steps"]
    rows = [row for step in steps for row in step["rows"]]
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "cuda", "cudnn", "triton"))
    ended = (f"{step['name']} {step['ended']} ({step['seconds']:.0f} s)" for step in steps)
    shown = [f"Versions: {versions}; kernels {machine['kernels']}. Steps: {', '.join(ended)}."]
    for key, columns in _COLUMNS.items():
        of_kind = [row for row in rows if key in row]
        if key == "what":
            of_kind = [row | {"bound": bound(row), "kept": verdict(row)} for row in of_kind]
        if of_kind:
            shown.append(table({"model": "{model}", **columns}, of_kind))
    return "\n\n".join(shown)


# By a key that only rows of one kind have.
_COLUMNS = {
    "what": {"what": "{what}", "figure": "{figure:.4g}", "bound": "{bound}", "kept": "{kept}"},
    "way": {
        "way": "{way}",
        "batch": "{batch}",
        "ms": "{ms:.3f}",
        "img/s": "{images_per_s:rate}",
        "TFLOP/s": "{tflops:.1f}",
    },
    "kernel": {"kernel": "`{kernel}`", "us": "{us:.1f}", "of the pass": "{share:.1%}"},
    "failed": {"case that failed": "{failed}", "error": "{error}"},
}


def main() -> None:
    """Run a part, or say what the machine is."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("part", choices=["first", "second", "environment"])
    parser.add_argument("steps", nargs="*", help="names of steps, or how they begin")
    arguments = parser.parse_args()
    part, device = arguments.part, os.environ.get("DEVICE", "cuda")
    if part == "environment":
        environment(*arguments.steps)
        return
    models = os.environ.get("MODELS", " ".join(CHECKED[device])).split()
    groups = first(device, models) if part == "first" else second(device)
    folder = Path(os.environ.get("OUT", ROOT / "bench" / "results")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        chosen = choose(groups, arguments.steps)
    except ValueError as error:
        parser.error(str(error))
    if not run(part, chosen, folder, patience=PATIENCE[device]):
        sys.exit(1)


if __name__ == "__main__":
    main()
