"""Time the fused kernels against plain torch and the roofline, on a CUDA device.

At every stage that has such a layer: sampling at learned positions, deformable attention and
local attention. Both sides are captured in a CUDA graph, as the service runs them. The roofline
of a step is what its inputs and outputs take at the measured rate of a copy, or its matrix
products at the measured rate of a large one, whichever is longer; a step whose tensors stay in
the cache of the device can be faster. The plain side attends in one piece, whatever the size.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.closed_loop import time_calls
from bench.machine import RESULTS, describe
from model import VARIANTS, DatConfig
from model.attention import DeformableAttention, sample_features
from model.dat import make_attention
from model.kernels.deformable_attention import attend
from model.kernels.offsets import sample_keys
from model.local_attention import LocalAttention, NeighborhoodAttention, WindowAttention

# Classifiers at a batch of the command line; the maps of a detector one image at a time.
CLASSIFIERS = ("dat_tiny_224", "dat_pp_tiny_224")
DETECTOR = VARIANTS["dat_pp_tiny_224"].resized((800, 1344))
# For a rehearsal on a CPU, where Triton interprets the kernels.
SMALL = VARIANTS["dat_nano"].resized((64, 64))


@dataclass(frozen=True)
class Step:
    """What one kernel computes.

    Attributes:
        name: what the table calls it.
        fused: by the kernel.
        plain: the same by torch.
        moved: bytes of all inputs and outputs.
        flops: of the matrix products.
    """

    name: str
    fused: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    moved: int
    flops: int


def steps(
    config: DatConfig, stage: int, batch: int, dtype: torch.dtype, device: str
) -> Iterator[Step]:
    """The steps of a stage, each kind of layer once, with random weights."""
    (H, W), dim = config.map_size(stage), config.stages[stage].dim
    tokens = torch.randn(batch, H, W, dim, device=device, dtype=dtype)
    for kind in dict.fromkeys(config.stages[stage].blocks):
        layer = make_attention(config, stage, kind).eval().to(device)
        for name, parameter in layer.named_parameters():
            if not name.endswith("relative_position_bias_table"):
                parameter.data = parameter.data.to(dtype)
        if isinstance(layer, DeformableAttention):
            yield from deformable_steps(layer, tokens)
        elif isinstance(layer, LocalAttention):
            yield local_step(layer, tokens)


def deformable_steps(layer: DeformableAttention, tokens: Tensor) -> Iterator[Step]:
    """Sampling, and attention to what was sampled."""
    queries = layer.q(tokens)

    def sample() -> tuple[Tensor, Tensor]:
        return sample_keys(
            tokens,
            queries,
            layer.offset_conv,
            layer.offset_norm,
            layer.offset_proj,
            layer.reference_points,
            layer.reach if layer.limited else None,
        )

    features, locations = sample()
    yield Step(
        "sampling",
        lambda: sample()[0],
        lambda: sample_features(tokens, layer.move(layer._offsets(queries))).to(tokens.dtype),
        tokens.nbytes + queries.nbytes + features.nbytes + locations.nbytes,
        0,
    )
    keys_values, queries_flat = layer.kv(features), queries.flatten(1, 2)
    table = layer.relative_position_bias_table
    q, k, v = (
        part.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for part in (queries_flat, *keys_values.chunk(2, -1))
    )

    def plain() -> Tensor:
        bias = layer.bias(locations).to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
        return attended.transpose(1, 2).flatten(2)

    yield Step(
        "deformable attention",
        lambda: attend(
            queries_flat, keys_values, table, layer.query_rows, layer.query_columns, locations
        ),
        plain,
        2 * queries.nbytes + keys_values.nbytes + table.nbytes + locations.nbytes,
        4 * queries.numel() * keys_values.shape[1],
    )


def local_step(layer: LocalAttention, tokens: Tensor) -> Step:
    """Attention in windows or neighbourhoods, between its projections."""
    assert isinstance(layer, (WindowAttention, NeighborhoodAttention))
    if isinstance(layer, NeighborhoodAttention):
        query_index, key_index = layer.query_index, layer.key_index
    else:
        query_index = key_index = layer.order.view(-1, layer.window**2)
    qkv = layer.qkv(tokens.flatten(1, 2))

    def plain() -> Tensor:
        gathered = (
            part.index_select(1, index.flatten()).unflatten(1, index.shape)
            for part, index in zip(
                qkv.chunk(3, -1), (query_index, key_index, key_index), strict=True
            )
        )
        return layer.attend(*gathered).index_select(1, layer.place)

    return Step(
        "local attention",
        lambda: layer.attend_by_index(qkv, query_index, key_index),
        plain,
        qkv.nbytes + tokens.nbytes,
        4 * tokens.numel() * layer.window**2,
    )


@dataclass(frozen=True)
class Rates:
    """What the device does at best: bytes copied (read and written) and FLOPs, a second."""

    bytes: float
    flops: float

    def seconds(self, step: Step) -> float:
        """The roofline of a step."""
        return max(step.moved / self.bytes, step.flops / self.flops)


def measure_rates(dtype: torch.dtype, device: str) -> Rates:
    """Time a copy of 1 GiB and a product of matrices of 8192, of less on a CPU."""
    bytes_copied, side = (1 << 30, 8192) if device == "cuda" else (1 << 20, 256)
    source = torch.empty(bytes_copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(a)
    return Rates(
        2 * source.nbytes / seconds(lambda: target.copy_(source)),
        2 * side**3 / seconds(lambda: torch.matmul(a, a, out=product)),
    )


def seconds(call: Callable[[], Tensor]) -> float:
    """Median duration of a call, on CUDA replayed as a graph."""
    if not call().is_cuda:
        return median(time_calls(call, 0))
    from triton.testing import do_bench_cudagraph  # noqa: PLC0415

    return 1e-3 * float(do_bench_cudagraph(call, return_mode="median"))


def compare(step: Step, rates: Rates) -> dict[str, Any]:
    """Time both sides of a step."""
    fused, plain, bound = seconds(step.fused), seconds(step.plain), rates.seconds(step)
    return {
        "step": step.name,
        "fused_us": 1e6 * fused,
        "plain_us": 1e6 * plain,
        "roofline_us": 1e6 * bound,
        "speedup": plain / fused,
        "of_roofline": bound / fused,
        "max_abs_difference": (step.fused().float() - step.plain().float()).abs().max().item(),
    }


def all_steps(
    layouts: list[tuple[DatConfig, int]], dtype: torch.dtype, device: str
) -> Iterator[tuple[dict[str, Any], Step]]:
    """The steps of all stages of networks and batches, each with where it is."""
    for config, batch in layouts:
        for stage in range(len(config.stages)):
            where = {
                "model": config.name,
                "image_size": list(config.image_size),
                "batch": batch,
                "stage": stage,
            }
            for step in steps(config, stage, batch, dtype, device):
                yield where, step


def main() -> None:
    """Time all steps, and print them."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("device", choices=["cpu", "cuda"], nargs="?", default="cuda")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    layouts = [
        *((VARIANTS[name], batch) for name in CLASSIFIERS for batch in arguments.batches),
        (DETECTOR, 1),
    ]
    rows = []
    with torch.inference_mode():
        rates = measure_rates(dtype, device)
        for where, step in all_steps([(SMALL, 1)] if device == "cpu" else layouts, dtype, device):
            rows.append(where | compare(step, rates))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "device": device,
        "dtype": arguments.dtype,
        "machine": describe("bench.kernels", device),
        "copied_bytes_per_s": rates.bytes,
        "flops_per_s": rates.flops,
        "steps": rows,
    }
    path = RESULTS / f"kernels-{device}-{arguments.dtype}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
