"""Time candidates of kernels: `python tune_b.py` on a GPU, JSON lines to `$OUT/tune_b.jsonl`.

`python tune_b.py small` rehearses on a CPU, with `TRITON_INTERPRET=1`.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import VARIANTS
from model.attention import relative_position_bias
from model.dat import make_attention
from model.fused import DepthwiseConv, tap_by_tap
from model.kernels import deformable_attention as old_attention
from model.kernels import depthwise, linear, packed_attention, pixels, pixels_residual, ranking
from model.kernels import ranking_split
from model.kernels.linear import Tile

SMALL = "small" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() and not SMALL else "cpu"
DTYPE = torch.bfloat16 if not SMALL else torch.float16
OUT = Path(os.environ.get("OUT", "/tmp"))
LIMIT = float(os.environ.get("TUNE_LIMIT", "85"))
WORKERS = 12
BORN = float(os.environ.get("TUNE_BORN", time.time()))
Candidates = list[tuple[str, Callable[[], Any]]]
# kernel, shape, reference (once, lazily), candidates
Group = tuple[str, str, Callable[[], Tensor], Candidates]


def variant(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of a module of kernels with another text."""
    text = Path(module.__file__).read_text()
    assert old in text
    name = f"variant_{module.__name__.rsplit('.', 1)[-1]}"
    path = Path("/tmp") / f"{name}_{os.getpid()}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


exact_linear = variant(linear, "gelu_rounded", "exact_gelu")
rounded_depthwise = variant(depthwise, "exact_gelu", "gelu_rounded")


def attention(name: str, size: tuple[int, int], stage: int, batch: int) -> Group:
    config = VARIANTS[name]
    if size != config.image_size:
        config = config.resized(size)
    spec, (H, W) = config.stages[stage], config.map_size(stage)
    layer = make_attention(config, stage, "D").eval().to(DEVICE)
    C, heads = spec.dim, spec.heads
    table = torch.randn_like(layer.relative_position_bias_table)
    packed = packed_attention.pack(table)
    Hk, Wk = layer.reference_points.shape[:2]
    offsets = torch.randn(batch, spec.offset_groups, Hk, Wk, 2, device=DEVICE)
    locations = layer.move(0.1 * offsets).contiguous()
    q = (0.2 * torch.randn(batch, H * W, C, device=DEVICE)).to(DTYPE)
    kv = torch.randn(batch, Hk * Wk, 2 * C, device=DEVICE).to(DTYPE)
    geometry = (layer.query_rows, layer.query_columns, locations)
    fits = config.family == "dat_pp" and tuple(table.shape[1:]) == (2 * H - 1, 2 * W - 1)

    def reference() -> Tensor:
        bias = relative_position_bias(table, *geometry)
        Q, K, V = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2).float()
            for part in (q, *kv.chunk(2, -1))
        )
        attended = (Q @ K.mT + bias).softmax(-1) @ V
        return attended.transpose(1, 2).flatten(2)

    def new(**kw: Any) -> Callable[[], Tensor]:
        return lambda: packed_attention.attend(q, kv, packed, *geometry, **kw)

    base = [("fits", {"fits": True})] if fits else []
    base += [("free", {"clamped": False})]
    candidates: Candidates = [
        ("old", lambda: old_attention.attend(q, kv, table, *geometry)),
        ("clamped t1", new(together=1)),
    ]
    for label, kw in base:
        candidates += [
            (f"{label} t1 64x32w4", new(together=1, **kw)),
            (f"{label} t2 64x32w4", new(together=2, **kw)),
            (f"{label} t1 64x16w4", new(together=1, block_keys=16, **kw)),
            (f"{label} t1 128x32w8", new(together=1, block_queries=128, warps=8, **kw)),
            (f"{label} t1 64x64w4", new(together=1, block_keys=64, **kw)),
            (f"{label} t2 64x16w4", new(together=2, block_keys=16, **kw)),
            (f"{label} t1 64x32w4 side 1", new(together=1, side=1, **kw)),
            (f"{label} t1 32x32w2", new(together=1, block_queries=32, warps=2, **kw)),
        ]
    where = f"{name} {size[0]}x{size[1]} stage {stage} batch {batch}"
    return "deformable_attention", where, reference, candidates


TILES = (
    Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 128, 8, 3), Tile(64, 128, 4, 3),
    Tile(128, 256, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 3),
    Tile(128, 128, 8, 4), Tile(128, 64, 4, 2),
)  # fmt: skip
SMALL_TILES = (
    Tile(64, 64, 4, 4), Tile(64, 32, 4, 4), Tile(64, 64, 4, 6), Tile(64, 32, 4, 6),
    Tile(32, 32, 4, 5), Tile(32, 64, 4, 5), Tile(16, 64, 4, 5), Tile(64, 128, 4, 4),
)  # fmt: skip


def linear_group(stage: int, batch: int) -> Group:
    config = VARIANTS["dat_tiny_224"]
    (H, W), K = config.map_size(stage), config.stages[stage].dim
    if SMALL:
        H, W, K = 5, 7, 32
    x = torch.randn(batch, H, W, K, device=DEVICE).to(DTYPE)
    fc = nn.Linear(K, 4 * K).to(DEVICE, DTYPE)
    w, b = fc.weight.data, fc.bias.data

    def at(tile: Tile) -> Callable[[], Tensor]:
        return lambda: linear.linear_gelu(x, w, b, tile)

    chosen = linear.choose_tile(batch * H * W, 4 * K)
    candidates: Candidates = [
        (f"erf {tuple(chosen)}", lambda: exact_linear.linear_gelu(x, w, b)),
        (f"rounded {tuple(chosen)}", at(chosen)),
        ("cuBLAS, GELU", lambda: F.gelu(F.linear(x, w, b))),
    ]
    candidates += [
        (f"rounded {tuple(tile)}", at(tile))
        for tile in (TILES if batch > 1 else SMALL_TILES)
        if tile != chosen
    ]

    def reference() -> Tensor:
        return F.gelu(F.linear(x.float(), w.float(), b.float()))

    return "linear_gelu", f"stage {stage} batch {batch}", reference, candidates


def rank_group(batch: int) -> Group:
    logits = torch.randn(batch, 100 if SMALL else 1000, device=DEVICE)
    candidates: Candidates = [("old", lambda: ranking.rank(logits).scores)]
    for classes, warps in ((32, 4), (64, 4), (64, 8), (16, 2), (32, 2)):
        candidates.append((
            f"split {classes} w{warps}",
            lambda classes=classes, warps=warps: ranking_split.rank(
                logits, classes=classes, warps=warps
            ).scores,
        ))  # fmt: skip
    for warps in (8, 4, 16):
        candidates.append((
            f"sort w{warps}",
            lambda warps=warps: ranking_split.rank_by_sort(logits, warps=warps).scores,
        ))  # fmt: skip
    return (
        "rank",
        f"batch {batch}",
        lambda: logits.softmax(-1).sort(dim=-1, descending=True, stable=True)[0],
        candidates,
    )


def pixels_group(batch: int) -> Group:
    side = 16 if SMALL else 224
    images = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=DEVICE)
    mean = torch.tensor([0.485, 0.456, 0.406], device=DEVICE)
    std = torch.tensor([0.229, 0.224, 0.225], device=DEVICE)
    candidates: Candidates = [("old", lambda: pixels.normalise(images, mean, std, DTYPE))]
    for block, warps in ((2048, 4), (1024, 4), (2048, 8), (4096, 8)):
        candidates.append((
            f"residual {block} w{warps}",
            lambda block=block, warps=warps: pixels_residual.normalise(
                images, mean, std, DTYPE, block=block, warps=warps
            ),
        ))  # fmt: skip
    # To the last bit: the difference from the kernel that divides, not from plain torch.
    return "normalise", f"batch {batch}", candidates[0][1], candidates


def depthwise_group(stage: int, batch: int) -> Group:
    config = VARIANTS["dat_pp_tiny_224"]
    (H, W), C = config.map_size(stage), 4 * config.stages[stage].dim
    if SMALL:
        H, W, C = 7, 7, 64
    hidden = torch.randn(batch, H, W, C, device=DEVICE).to(DTYPE)
    conv = DepthwiseConv(C).to(DEVICE, DTYPE)
    conv.weight.data = tap_by_tap(conv.weight.data)
    plain = nn.Conv2d(C, C, 3, padding=1, groups=C).to(DEVICE)
    plain.weight.data = conv.weight.data.float().contiguous()
    plain.bias.data = conv.bias.data.float()

    def reference() -> Tensor:
        maps = plain(hidden.float().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return F.gelu(maps)

    candidates: Candidates = [
        ("erf", lambda: depthwise.convolve_gelu(hidden, conv)),
        ("rounded", lambda: rounded_depthwise.convolve_gelu(hidden, conv)),
    ]
    return "convolution + GELU", f"stage {stage} batch {batch}", reference, candidates


def groups() -> Iterator[Callable[[], Group]]:
    big = 2 if SMALL else 32
    size, detector = (224, 224), (96, 160) if SMALL else (800, 1344)
    T, P = "dat_tiny_224", "dat_pp_tiny_224"
    stages = (3,) if SMALL else (0, 1, 2, 3)
    yield lambda: attention(T, size, 3 if SMALL else 2, big)
    for stage in stages:
        yield lambda stage=stage: linear_group(stage, big)
    yield lambda: rank_group(big)
    for stage in stages:
        yield lambda stage=stage: attention(P, size, stage, big)
    yield lambda: pixels_group(big)
    for stage in stages:
        yield lambda stage=stage: depthwise_group(stage, big)
    for stage in stages:
        yield lambda stage=stage: attention(P, detector, stage, 1)
    if SMALL:
        return
    yield lambda: attention(T, size, 3, 32)
    for stage in stages:
        yield lambda stage=stage: linear_group(stage, 1)
    yield lambda: attention(T, size, 2, 1)
    yield lambda: rank_group(1)
    yield lambda: rank_group(128)
    yield lambda: pixels_group(1)
    for stage in stages:
        yield lambda stage=stage: attention(P, size, stage, 1)
    yield lambda: attention(T, size, 3, 1)


def seconds(call: Callable[[], Any]) -> float:
    """Of one launch, replayed in a graph."""
    if DEVICE == "cpu":
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    launches = 50 if start.elapsed_time(end) < 0.3 else 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    graph.replay()
    times = []
    for _ in range(5):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e-3 * median(times) / launches


def warm(index: int) -> None:
    """Compile every so manieth candidate, into Triton's cache on disk."""
    number = 0
    for make in groups():
        if time.time() - BORN > 45:
            return
        group = make()
        for _, call in group[3]:
            if number % WORKERS == index:
                try:
                    call()
                except Exception:
                    traceback.print_exc()
            number += 1


def main() -> None:
    torch.manual_seed(0)
    if "warm" in sys.argv:
        warm(int(sys.argv[-1]))
        return
    if DEVICE == "cuda":
        environment = os.environ | {"TUNE_BORN": str(BORN)}
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "warm", str(index)],
                env=environment,
                stderr=subprocess.DEVNULL,
            )
            for index in range(WORKERS)
        ]
        for worker in workers:
            try:
                worker.wait(max(1.0, 50 - (time.time() - BORN)))
            except subprocess.TimeoutExpired:
                worker.kill()
        print(f"warm after {time.time() - BORN:.1f} s", flush=True)
    with (OUT / "tune_b.jsonl").open("w") as file:
        for make in groups():
            if time.time() - BORN > LIMIT:
                print("out of time", flush=True)
                break
            kernel, shape, reference, candidates = make()
            right = reference().float()
            for name, call in candidates:
                if time.time() - BORN > LIMIT:
                    break
                row: dict[str, Any] = {"kernel": kernel, "shape": shape, "candidate": name}
                try:
                    row["error"] = (call().float() - right).abs().max().item()
                    row["us"] = round(1e6 * seconds(call), 2)
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {error}"[:300]
                line = json.dumps(row)
                file.write(line + "\n")
                file.flush()
                print(line, flush=True)
            del right, reference, candidates
    print(f"done after {time.time() - BORN:.1f} s", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
