"""Where a forward pass spends its time, by torch's profiler.

The table of all kernels goes into `gpu-profile.txt` beside the results; the share of each of the
hottest is printed as a JSON object.
"""

import torch
from torch.profiler import ProfilerActivity, profile

from bench.findings import note
from bench.graphs import DTYPE, TARGETS, network
from bench.harness import RESULTS, options
from bench.rival import make_pixels

PASSES = 3
ROWS = 12  # of the kernels that are printed


def main() -> None:
    """Profile eager forward passes of the models of the command line."""
    chosen = options(
        "bench.hottest", __doc__, {"device": DTYPE}, device="cuda", models=list(TARGETS), batch=32
    )
    device, clock = chosen.device, "self_cpu_time_total"
    activity = ProfilerActivity.CPU
    if device == "cuda":
        activity, clock = ProfilerActivity.CUDA, "self_device_time_total"
    (RESULTS / "gpu-profile.txt").unlink(missing_ok=True)
    for name in chosen.models:
        classify = network(name, device)
        pixels = torch.from_numpy(make_pixels(name, chosen.batch)).to(device)
        with torch.inference_mode():
            classify(pixels)
            with profile(activities=[activity]) as profiled:
                for _ in range(PASSES):
                    classify(pixels)
                if device == "cuda":
                    torch.cuda.synchronize()
        averages = profiled.key_averages()
        with (RESULTS / "gpu-profile.txt").open("a") as file:
            table = averages.table(sort_by=clock, row_limit=40, max_name_column_width=110)
            file.write(f"{name}, batch {chosen.batch}, {PASSES} forward passes\n{table}\n")
        times = {event.key: getattr(event, clock) / PASSES for event in averages}
        total = sum(times.values())
        for kernel, taken in sorted(times.items(), key=lambda item: -item[1])[:ROWS]:
            note(model=name, kernel=kernel, us=round(taken, 1), share=round(taken / total, 4))


if __name__ == "__main__":
    main()
