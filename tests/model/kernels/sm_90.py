"""Compile the kernels for sm_90 as the layers launch them, on any machine.

Run by `test_sm_90.py` in a process of its own, because Triton is either an interpreter or a
compiler from its import on. Prints a JSON list with what each compiled kernel takes.
"""

import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from model import VARIANTS, DatConfig
from model.fused import DepthwiseConv, tap_by_tap
from model.kernels.deformable_attention import attend
from model.kernels.depthwise import convolve_gelu, convolve_sum_norm
from model.kernels.linear import linear_gelu
from model.kernels.local_attention import attend_in_tiles
from model.kernels.nms import search
from model.kernels.norm import add_norm, norm_activate
from model.kernels.offsets import sample_keys
from model.kernels.packed_attention import attend as attend_packed
from model.kernels.pixels import normalise, normalise_padded
from model.kernels.pooling import normed_mean
from model.kernels.ranking import MOST_CLASSES, rank
from model.kernels.roi_align import align
from model.kernels.trial import add_one

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
CONTRACTED = re.compile(r"\b(?:fma|mad)\.\S*f32")
APPROXIMATE = re.compile(r"\b\w+\.(?:approx|full|ftz)\.\S*f32")
# Both families; depthwise kernels of 5 and 9 cells; 128, 64 and 96 channels a group.
LAYERS = (
    ("dat_tiny_224", 2, torch.bfloat16),
    ("dat_tiny_224", 2, torch.float32),
    ("dat_pp_tiny_224", 0, torch.float16),
    ("dat_pp_small_224", 0, torch.float32),
)
# Queries and keys of a tile: windows, neighbourhoods, and a small map in one piece.
TILES = {"dat": ((49, 49),), "dat_pp": ((49, 169), (196, 196))}
# Channels of a stage: the fewest and the most there are, and what is no power of two.
BLOCKS = (
    (64, torch.bfloat16),
    (96, torch.float16),
    (96, torch.float32),
    (1024, torch.bfloat16),
    (1024, torch.float32),
)


class Sm90:
    """A driver for a device that need not be there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def main() -> None:
    kernels: list[dict[str, Any]] = []

    def compile_only(kernel: Any, grid: Any) -> Any:
        def compile_for(tensor: Tensor, *arguments: Any, **options: Any) -> None:
            compiled = kernel.warmup(tensor, *arguments, grid=grid, **options)
            facts = {
                "kernel": kernel.__name__,
                "dtype": str(tensor.dtype),
                "shape": list(tensor.shape),
                "contracted": len(CONTRACTED.findall(compiled.asm["ptx"])),
            }
            kernels.append(facts | resources(compiled))

        return compile_for

    triton.runtime.driver.set_active(Sm90())
    JITFunction.__getitem__ = compile_only
    for name, stage, dtype in LAYERS:
        config = VARIANTS[name]
        launch_deformable(config, stage, dtype)
        for queries, keys in TILES[config.family]:
            launch_local(config, stage, dtype, queries, keys)
    for dim, dtype in BLOCKS:
        launch_block(dim, dtype)
    launch_linear()
    launch_ends()
    launch_search()
    launch_roi_align()
    add_one(torch.empty(300))
    sys.stdout.write(json.dumps(kernels))


def launch_deformable(config: DatConfig, stage: int, dtype: torch.dtype) -> None:
    spec, (H, W) = config.stages[stage], config.map_size(stage)
    Hk, Wk = (-(-side // spec.offset_stride) for side in (H, W))
    channels, kernel = spec.dim // spec.offset_groups, spec.offset_kernel
    conv = nn.Conv2d(channels, channels, kernel, spec.offset_stride, kernel // 2, groups=channels)
    tokens = torch.empty(2, H, W, spec.dim, dtype=dtype)
    features, locations = sample_keys(
        tokens,
        tokens,
        conv.to(dtype),
        nn.LayerNorm(channels, dtype=dtype),
        nn.Linear(channels, 2, bias=False, dtype=dtype),
        torch.empty(Hk, Wk, 2),
        torch.empty(2) if config.family == "dat" else None,
    )
    inputs = (tokens.flatten(1, 2), torch.cat((features, features), -1))
    geometry = (torch.empty(H), torch.empty(W), locations)
    if dtype == torch.float32:
        attend(*inputs, torch.empty(spec.heads, 2 * H - 1, 2 * W - 1), *geometry)
        return
    packed = torch.empty(spec.heads, 2 * H + 1, 2 * W + 1, dtype=torch.int64)
    for clamped, fits in ((True, False), (False, False), (False, True)):
        attend_packed(*inputs, packed, *geometry, clamped=clamped, fits=fits)


def launch_local(
    config: DatConfig, stage: int, dtype: torch.dtype, queries: int, keys: int
) -> None:
    spec, cells = config.stages[stage], prod(config.map_size(stage))
    attend_in_tiles(
        torch.empty(2, cells, 3 * spec.dim, dtype=dtype),
        torch.empty(4, spec.heads, queries, keys),
        torch.empty(4, dtype=torch.int64),
        torch.empty(4, queries, dtype=torch.int64),
        torch.empty(4, keys, dtype=torch.int64),
        torch.empty(cells, dtype=torch.int64),
    )


def launch_block(dim: int, dtype: torch.dtype) -> None:
    """What a block of DAT++ and the layers between stages take beside attention."""
    tokens = torch.empty(2, 14, 14, dim, dtype=dtype)
    norm = nn.LayerNorm(dim, dtype=dtype)
    convolve_sum_norm(tokens, tokens, _depthwise(dim, dtype), norm)
    convolve_gelu(torch.empty(2, 14, 14, 4 * dim, dtype=dtype), _depthwise(4 * dim, dtype))
    add_norm(tokens, tokens, norm)
    norm_activate(tokens, norm.bias, norm, gelu=True)


def _depthwise(channels: int, dtype: torch.dtype) -> nn.Conv2d:
    """With its weights as they lie on CUDA."""
    conv = DepthwiseConv(channels).to(dtype)
    conv.weight.data = tap_by_tap(conv.weight.data)
    return conv


def launch_linear() -> None:
    """Every tile: stages of DAT-B for one image, of DAT-B and DAT-T for 128."""
    dtype = torch.bfloat16
    for M, K in ((3136, 128), (784, 256), (49, 1024), (128 * 49, 1024), (128 * 3136, 96)):
        linear_gelu(
            torch.empty(M, K, dtype=dtype),
            torch.empty(4 * K, K, dtype=dtype),
            torch.empty(4 * K, dtype=dtype),
        )


def launch_ends() -> None:
    """What comes before and after the network."""
    pixels, constants = torch.empty(2, 224, 224, 3, dtype=torch.uint8), torch.empty(3)
    for dtype in (torch.float32, torch.bfloat16):
        normalise(pixels, constants, constants, dtype)
        normalise_padded(pixels, torch.empty(2, 2, dtype=torch.int64), constants, constants, dtype)
    for classes in (1, 1000, MOST_CLASSES):
        rank(torch.empty(2, classes))
    for dtype, channels in ((torch.bfloat16, 768), (torch.float32, 1024)):
        normed_mean(torch.empty(2, 7, 7, channels, dtype=dtype), nn.LayerNorm(channels))


def launch_search() -> None:
    """Over the proposals of a batch, for two images."""
    search(torch.empty(10, 1000, 4), torch.empty(10, dtype=torch.int64), 0.7, 1000)


def launch_roi_align() -> None:
    """As the heads of boxes and of masks do, with the channels of the published detectors."""
    for dtype, bins in ((torch.bfloat16, 7), (torch.bfloat16, 14), (torch.float32, 14)):
        levels = [torch.empty(2, 8, 8, 256, dtype=dtype) for _ in range(4)]
        align(levels, torch.empty(2, 100, 4), bins)


def resources(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes: registers and stack bytes of a thread, shared bytes.

    It is `approximate` if an operation of it is not rounded to the nearest number.
    """
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        command = [str(TOOLS / "cuobjdump"), "-res-usage", str(binary)]
        report = subprocess.run(command, capture_output=True, text=True, check=True)
    registers, stack, _, local = map(int, USAGE.findall(report.stdout)[0])
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "approximate": bool(APPROXIMATE.search(kernel.asm["ptx"])),
    }


if __name__ == "__main__":
    main()
