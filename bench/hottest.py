"""Where a forward pass spends its time, and what the two hottest of our kernels wait for.

The first is said by torch's profiler, the second by `ncu`, which comes with CUDA, where it is
installed. The table of all kernels goes into `gpu-profile.txt` beside the results, what `ncu`
says into `gpu-ncu.txt`; each kernel's share is printed as a JSON object.
"""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.findings import note
from bench.graphs import DTYPE, TARGETS, network
from bench.harness import RESULTS, options
from bench.rival import make_pixels
from model import kernels

MODELS = list(TARGETS)
PASSES = 3
ROWS = 12  # of the kernels that are printed
_NCU = (
    *("ncu", "--clock-control", "none", "--launch-count", "16", "--section", "SpeedOfLight"),
    *("--section", "MemoryWorkloadAnalysis", "--section", "Occupancy"),
    *("--section", "WarpStateStats", "--section", "SchedulerStats"),
)


def forward(name: str, batch: int, kind: str) -> None:
    """Run one forward pass eagerly."""
    pixels = torch.from_numpy(make_pixels(name, batch)).to(kind)
    with torch.inference_mode():
        network(name, kind)(pixels)
    if kind == "cuda":
        torch.cuda.synchronize()


def shares(name: str, batch: int, kind: str) -> dict[str, float]:
    """Microseconds of each kernel in one pass, the most first."""
    forward(name, batch, kind)
    activity = ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        for _ in range(PASSES):
            forward(name, batch, kind)
    averages = profiled.key_averages()
    clock = f"self_{'device' if kind == 'cuda' else 'cpu'}_time_total"
    with (RESULTS / "gpu-profile.txt").open("a") as file:
        table = averages.table(sort_by=clock, row_limit=40, max_name_column_width=110)
        file.write(f"{name}, batch {batch}, {PASSES} forward passes\n{table}\n")
    times = {event.key: getattr(event, clock) / PASSES for event in averages}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def is_ours(kernel: str) -> bool:
    """Whether a kernel is one of `model.kernels`."""
    sources = Path(kernels.__file__).parent.glob("*.py")
    return any(f"def {kernel}(" in source.read_text("utf-8") for source in sources)


def main() -> None:
    """Profile the models of the command line, and the two hottest kernels of all.

    With an `only` of 1 each model runs once, for another profiler.
    """
    chosen = options(
        "bench.hottest", __doc__, {"device": DTYPE}, device="cuda", models=MODELS, batch=32, only=0
    )
    device, batch = chosen.device, chosen.batch
    if chosen.only:
        for name in chosen.models:
            forward(name, batch, device)
        return
    (RESULTS / "gpu-profile.txt").unlink(missing_ok=True)
    ours = Counter[str]()
    for name in chosen.models:
        times = shares(name, batch, device)
        total = sum(times.values())
        for kernel, taken in list(times.items())[:ROWS]:
            note(model=name, kernel=kernel, us=round(taken, 1), share=round(taken / total, 4))
        ours.update({kernel: taken for kernel, taken in times.items() if is_ours(kernel)})
    hottest = [kernel for kernel, _ in ours.most_common(2)]
    if hottest and shutil.which("ncu"):
        names = ("--kernel-name", f"regex:^({'|'.join(hottest)})$")
        file = ("--log-file", str(RESULTS / "gpu-ncu.txt"))
        once = ("--only", "1", "--batch", str(batch), "--device", device, "--models")
        again = (sys.executable, "-m", "bench.hottest", *once, *chosen.models)
        subprocess.run((*_NCU, *names, *file, *again), check=True)


if __name__ == "__main__":
    main()
