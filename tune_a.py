"""Time candidates of the depthwise and the local attention kernels: `python tune_a.py [cuda|cpu]`."""

import json
import multiprocessing
import os
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import tune_old_depthwise as old_depthwise
import tune_old_local as old_local
from model import VARIANTS
from model.dat import make_attention
from model.fused import DepthwiseConv, tap_by_tap
from model.kernels import depthwise, local_attention
from model.local_attention import LocalAttention, NeighborhoodAttention

START = time.monotonic()
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
BUDGET_S = float(os.environ.get("TUNE_S", "88"))
COMPILE_S = 40.0
LAUNCHES = 50
OUT = Path(os.environ.get("OUT", "/tmp")) / "tune_a.jsonl"
SMALL = DEVICE == "cpu"
DTYPE = torch.bfloat16

# elements, channels a thread, rows, channels a block
GELU = [
    "old", (256, 2, 7, 64), (512, 4, 7, 64), (256, 2, 4, 64), (512, 2, 7, 64), (128, 2, 7, 64),
    (256, 2, 14, 64), (512, 4, 4, 64), (256, 2, 2, 64), (256, 4, 7, 64), (512, 4, 14, 64),
    (256, 2, 7, 128), (256, 2, 7, 32), (1024, 8, 7, 64),
    (512, 4, 2, 64), (256, 4, 14, 64), (1024, 4, 7, 64), (256, 4, 4, 64), (128, 2, 4, 64),
]  # fmt: skip
# elements, channels a thread, rows
NORM = [
    "old", (512, 2, 7), (512, 2, 4), (512, 2, 2), (512, 4, 7), (512, 4, 4), (256, 2, 7), (1024, 4, 7),
    (1024, 2, 4), (512, 1, 4), (512, 2, 14), (512, 2, 1), (512, 4, 2), (512, 1, 2),
    (256, 4, 7), (256, 4, 4), (256, 2, 4), (256, 2, 2), (256, 4, 2), (128, 4, 7), (512, 4, 14),
]  # fmt: skip
# queries, keys, warps, stages
WINDOWS = [
    "old", (64, 64, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1), (32, 64, 2, 1),
    (64, 32, 4, 2), (16, 64, 2, 1), (64, 16, 4, 2),
]  # fmt: skip
NEIGHBOURHOODS = [
    "old", (64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 1), (64, 64, 8, 1),
    (64, 128, 4, 1), (32, 64, 4, 1), (32, 64, 2, 1), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 8, 1),
    (64, 64, 8, 2), (32, 32, 2, 2),
]  # fmt: skip
LARGE = [  # tiles of more than 64 queries
    *NEIGHBOURHOODS[:9], (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 4, 1), (128, 32, 8, 2),
    (256, 64, 8, 1),
]  # fmt: skip


def conv_of(C, device):
    torch.manual_seed(C)
    conv = DepthwiseConv(C)
    conv.weight.data = tap_by_tap(torch.randn(C, 1, 3, 3) / 3)
    return conv.to(device, DTYPE).requires_grad_(False)


class Gelu:
    kernel, form = "depthwise", "convolution + GELU"

    def __init__(self, shape, device):
        self.shape, self.conv = shape, conv_of(shape[-1], device)
        self.tokens = torch.randn(shape, device=device, dtype=DTYPE)
        self.candidates = GELU

    def run(self, candidate):
        if candidate == "old":
            return old_depthwise.convolve_gelu(self.tokens, self.conv)
        elements, channels, rows, block = candidate
        depthwise.GELU = depthwise.Launch(elements, channels, rows, rows, block)
        return depthwise.convolve_gelu(self.tokens, self.conv)

    def key(self, candidate):
        return candidate

    def plain(self):
        return F.gelu(_convolved(self.conv, self.tokens.float()))


class Norm:
    kernel, form = "depthwise", "sum + convolution + norm"

    def __init__(self, shape, device):
        self.shape, self.conv = shape, conv_of(shape[-1], device)
        self.tokens, self.branch = torch.randn(2, *shape, device=device, dtype=DTYPE)
        self.norm = nn.LayerNorm(shape[-1]).to(device, DTYPE).requires_grad_(False)
        self.candidates = NORM

    def run(self, candidate):
        kernels = old_depthwise if candidate == "old" else depthwise
        if candidate != "old":
            elements, channels, rows = candidate
            depthwise.NORM = depthwise.Launch(elements, channels, rows, rows)
        return kernels.convolve_sum_norm(self.tokens, self.branch, self.conv, self.norm)[1]

    def key(self, candidate):
        if candidate == "old":
            return candidate
        elements, channels, rows = candidate
        return max(elements, self.shape[-1]), channels, rows

    def plain(self):
        total = self.tokens.float() + self.branch.float()
        return F.layer_norm(_convolved(self.conv, total), self.shape[-1:])


def _convolved(conv, tokens):
    maps = tokens.permute(0, 3, 1, 2)
    out = F.conv2d(maps, conv.weight.float(), conv.bias.float(), padding=1, groups=maps.shape[1])
    return out.permute(0, 2, 3, 1)


class Local:
    kernel = "local attention"

    def __init__(self, config, stage, batch, device):
        kinds = [kind for kind in config.stages[stage].blocks]
        layers = (make_attention(config, stage, kind) for kind in dict.fromkeys(kinds))
        layer = next(layer for layer in layers if isinstance(layer, LocalAttention))
        torch.manual_seed(0)
        layer.relative_position_bias_table.data.normal_()
        self.layer = layer.eval().to(device).requires_grad_(False)
        neighbours = isinstance(layer, NeighborhoodAttention)
        self.form = "neighbourhoods" if neighbours else "windows"
        if neighbours:
            self.index = layer.query_index, layer.key_index
        else:
            self.index = (layer.order.view(-1, layer.window**2),) * 2
        self.bias = layer.laid_out_bias
        self.narrow = self.bias[..., : self.index[1].shape[1]].contiguous()
        H, W = config.map_size(stage)
        C = config.stages[stage].dim
        self.qkv = torch.randn(batch, H * W, 3 * C, device=device, dtype=DTYPE)
        self.qkv[..., :C] *= (C // layer.heads) ** -0.5
        queries, keys = (index.shape[1] for index in self.index)
        self.shape = [batch, H, W, C, queries, keys]
        large = LARGE if queries > 64 else NEIGHBOURHOODS
        self.candidates = large if neighbours else WINDOWS

    def run(self, candidate):
        layer = self.layer
        rest = (layer.bias_index, *self.index, layer.place)
        if candidate == "old":
            return old_local.attend_in_tiles(self.qkv, self.narrow, *rest)
        local_attention.LAUNCH = local_attention.Launch(*candidate)
        return local_attention.attend_in_tiles(self.qkv, self.bias, *rest)

    def key(self, candidate):
        return candidate

    def plain(self):
        parts = self.qkv.float().chunk(3, -1)
        query, key = self.index
        gathered = [
            part.index_select(1, index.flatten()).unflatten(1, index.shape)
            for part, index in zip(parts, (query, key, key), strict=True)
        ]
        return self.layer.attend(*gathered).index_select(1, self.layer.place)


def makers():
    """One for each case, those of batch 32 first, those of compiled kernels once more marked."""
    for batch in (2,) if SMALL else (32, 1):
        for name in ("dat_pp_tiny_224", "dat_tiny_224"):
            config = VARIANTS[name]
            for stage, spec in enumerate(config.stages):
                H, W = config.map_size(stage)
                H, W = (7, 7) if SMALL else (H, W)
                if SMALL and stage < 3:
                    if stage == 2:
                        yield batch, partial(Local, config, stage, 1)
                    continue
                if config.family == "dat_pp":
                    yield batch, partial(Gelu, (batch, H, W, 4 * spec.dim // (16 if SMALL else 1)))
                    yield batch, partial(Norm, (batch, H, W, spec.dim))
                if config.family == "dat" or stage < 3:
                    yield batch, partial(Local, config, stage, batch)


class Sm90:
    """A driver for a device that need not be there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return device


def compile_case(job):
    """Into the cache on disk, in a process of its own."""
    maker, i = job
    import triton
    from triton.runtime.jit import JITFunction

    torch.set_num_threads(1)
    begun = time.monotonic()
    triton.runtime.driver.set_active(Sm90())
    facts = {}

    def compile_only(kernel, grid):
        def compile_for(*arguments, **options):
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            facts["shared"] = compiled.metadata.shared
            facts["cubin"] = compiled.asm["cubin"]

        return compile_for

    JITFunction.__getitem__ = compile_only
    case = CASES.get(maker) or CASES.setdefault(maker, MAKERS[maker]("cpu"))
    if i >= len(case.candidates):
        return None
    candidate = case.candidates[i]
    try:
        case.run(candidate)
    except Exception as fault:  # noqa: BLE001
        return {"fault": repr(fault)[:200], "form": case.form, "candidate": candidate}
    row = {"form": case.form, "shape": case.shape, "candidate": candidate}
    row |= {"shared": facts["shared"], "seconds": time.monotonic() - begun}
    if os.environ.get("TUNE_RESOURCES"):
        row |= usage(facts["cubin"])
    return row


def usage(cubin):
    import re
    import subprocess
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)[0]
    return {"registers": int(found[0]), "spilled": int(found[1]) + int(found[3])}


CASES = {}
MAKERS = []


def seconds(call):
    if SMALL:
        begun = time.monotonic()
        call()
        return time.monotonic() - begun
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    graph.replay()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e-3 * begin.elapsed_time(end) / LAUNCHES)
    return median(times)


def main():
    batches, MAKERS[:] = (list(each) for each in zip(*makers(), strict=True))
    count = max(map(len, (GELU, NORM, WINDOWS, NEIGHBOURHOODS, LARGE)))
    if DEVICE != "cpu":
        # A kernel for batch 1 is one for batch 32.
        jobs = [(m, i) for i in range(count) for m, b in enumerate(batches) if b == batches[0]]
        workers = int(os.environ.get("TUNE_WORKERS", max(1, (os.cpu_count() or 2) - 2)))
        pool = multiprocessing.get_context("fork").Pool(workers)
        compiled = pool.imap_unordered(compile_case, jobs)
        limit = float(os.environ.get("TUNE_COMPILE_S", COMPILE_S))
        done = 0
        try:
            for _ in jobs:
                row = compiled.next(timeout=max(0.1, START + limit - time.monotonic()))
                done += 1
                if row and (DEVICE == "compile" or "fault" in row):
                    print(json.dumps(row), flush=True)
        except multiprocessing.TimeoutError:
            pass
        pool.terminate()
        print(f"compiled {done}/{len(jobs)} in {time.monotonic() - START:.1f} s", flush=True)
        if DEVICE == "compile":
            return
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    expected, seen = {}, set()
    with torch.inference_mode(), OUT.open("w") as file:
        for i in range(count):
            for m, maker in enumerate(MAKERS):
                if time.monotonic() - START > BUDGET_S:
                    print("cut off", i, m)
                    return summary()
                case = CASES.get(m) or CASES.setdefault(m, maker(DEVICE))
                if i >= len(case.candidates):
                    continue
                candidate = case.candidates[i]
                if (m, case.key(candidate)) in seen:
                    continue
                seen.add((m, case.key(candidate)))
                row = {"kernel": case.kernel, "form": case.form, "shape": list(case.shape)}
                row["candidate"] = candidate
                try:
                    if m not in expected:
                        expected[m] = case.plain()
                    right = expected[m]
                    error = (case.run(candidate).float() - right).abs().max() / right.abs().max()
                    row |= {"error": error.item()}
                    row |= {"us": 1e6 * seconds(partial(case.run, candidate))}
                except Exception as fault:  # noqa: BLE001
                    row["fault"] = repr(fault)[:300]
                file.write(json.dumps(row) + "\n")
                file.flush()
    print(f"all in {time.monotonic() - START:.1f} s")
    summary()


def summary():
    rows = [json.loads(line) for line in OUT.read_text().splitlines()]
    shapes = {}
    for row in rows:
        shapes.setdefault((row["form"], *row["shape"]), []).append(row)
    for shape, of_shape in shapes.items():
        timed = sorted((row for row in of_shape if "us" in row), key=lambda row: row["us"])
        best = ", ".join(f"{row['candidate']} {row['us']:.1f}" for row in timed[:4])
        old = [f"{row['us']:.1f}" for row in timed if row["candidate"] == "old"]
        print(*shape, "old", *old, "|", best)


if __name__ == "__main__":
    main()
