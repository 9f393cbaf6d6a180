"""Time the fused kernels against plain torch and the roofline, on a CUDA device.

Everything that a stage has a kernel for, and what comes before and after the stages. Both sides
are captured in a CUDA graph, as the service runs them. The roofline of a step is what its inputs
and outputs take at the measured rate of a copy, or its matrix products at the measured rate of a
large one, whichever is longer; a step whose tensors stay in the cache of the device can be faster.
The plain side attends in one piece, whatever the size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.findings import Cases, note
from bench.graphs import Way
from bench.harness import Row, options, publish, table, time_calls
from model import DAT, VARIANTS, DatConfig
from model.attention import DeformableAttention, sample_features
from model.dat import Block, BlockPP, ConvMlp, Stage, make_attention
from model.fused import (
    Stream,
    add_norm,
    channels_last_tokens,
    convolve,
    convolve_sum_norm,
    keep_kernels_channels_last,
    linear,
)
from model.kernels import HALF
from model.kernels.offsets import sample_keys
from model.kernels.ranking import rank
from model.local_attention import LocalAttention, NeighborhoodAttention, WindowAttention
from model.normalise import Normalise

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
    flops: int = 0

    @classmethod
    def switched(cls, name: str, call: Callable[[], Tensor], *read: Tensor, **facts: Any) -> Self:
        """What a layer computes by its kernel, and without where kernels are switched off.

        Args:
            name: of the step.
            call: of the layer.
            read: what it reads.
            facts: of the step; `moved` where it is more than `read` and what is returned.
        """

        def by(way: Way) -> Tensor:
            with way.switched():
                return call()

        fused, plain = (partial(by, Way(fused=on)) for on in (True, False))
        moved = sum(tensor.nbytes for tensor in (*read, fused()))
        return cls(name, fused, plain, **({"moved": moved} | facts))


def attention_steps(
    config: DatConfig, stage: int, batch: int, dtype: torch.dtype, device: str
) -> Iterator[Step]:
    """Attention of each kind that a stage has."""
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
    half = tokens.dtype in HALF
    table = layer.packed_table() if half else layer.relative_position_bias_table
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
        lambda: layer.attend_by_kernel(queries_flat, keys_values, locations),
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


def block_steps(
    config: DatConfig, stage: int, batch: int, dtype: torch.dtype, device: str
) -> Iterator[Step]:
    """What a block has beside attention, and what leads to its stage from the one before."""
    (H, W), dim = config.map_size(stage), config.stages[stage].dim
    layers = Stage(config, stage)
    keep_kernels_channels_last(layers)
    block = layers.eval().to(device, dtype).blocks[0]
    assert isinstance(block, Block)
    tokens, branch = torch.randn(2, batch, H, W, dim, device=device, dtype=dtype)
    stream = Stream(tokens, branch)
    both = {"moved": 4 * tokens.nbytes}  # two maps in, two out
    yield Step.switched("sum + norm", lambda: add_norm(block.norm2, stream).normed, **both)
    mlp = block.mlp
    if isinstance(block, BlockPP) and isinstance(mlp, ConvMlp):
        yield Step.switched(
            "sum + convolution + norm",
            lambda: convolve_sum_norm(block.lpu, block.norm1, stream).normed,
            **both,
        )
        hidden = mlp.fc1(tokens)
        yield Step.switched(
            "convolution + GELU", lambda: convolve(mlp.dwconv, hidden, "gelu"), hidden
        )
    else:
        yield Step.switched(
            "linear + GELU",
            lambda: linear(mlp.fc1, tokens, "gelu"),
            *(tokens, mlp.fc1.weight),
            flops=8 * tokens.numel() * dim,
        )


def end_steps(config: DatConfig, batch: int, dtype: torch.dtype, device: str) -> Iterator[Step]:
    """What comes before and after the stages of a classifier."""
    pixels = torch.randint(256, (batch, *config.image_size, 3), dtype=torch.uint8, device=device)
    normalise = Normalise(dtype).to(device)
    yield Step.switched("pixels", lambda: normalise(pixels), pixels)
    network = DAT(config).cast(dtype).eval().to(device)
    images = channels_last_tokens(normalise(pixels))
    yield Step.switched("stem", lambda: network.stem(images), images)
    (H, W), dim = config.map_size(len(config.stages) - 1), config.stages[-1].dim
    last = torch.randn(batch, H, W, dim, device=device, dtype=dtype)
    yield Step.switched("norm + mean", lambda: network.pooled(last), last)
    logits = torch.randn(batch, config.num_classes, device=device)
    yield Step(
        "ranking",
        lambda: rank(logits).scores,
        lambda: logits.softmax(-1).sort(dim=-1, descending=True, stable=True)[0],
        3 * logits.nbytes,  # logits, scores and classes
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


def compare(step: Step, rates: Rates) -> Row:
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
    batches: Sequence[int], dtype: torch.dtype, device: str
) -> Iterator[tuple[Row, Iterator[Step]]]:
    """Every step, in groups that have a place; of detectors those of their backbone."""
    layouts = [(VARIANTS[name], batch) for name in CLASSIFIERS for batch in batches]
    for config, batch in [(SMALL, 1)] if device == "cpu" else [*layouts, (DETECTOR, 1)]:
        where = {"model": config.name, "image_size": list(config.image_size), "batch": batch}
        for stage in range(len(config.stages)):
            for kind in (attention_steps, block_steps):
                yield where | {"stage": stage}, kind(config, stage, batch, dtype, device)
        yield where | {"stage": "ends"}, end_steps(config, batch, dtype, device)


def tables(result: Row) -> str:
    """The table of one `kernels-*.json`; stages count from 0."""
    columns = {
        "model": "{model}",
        "image": "{image_size:x}",
        "batch": "{batch}",
        "stage": "{stage}",
        "step": "{step}",
        "kernel us": "{fused_us:.1f}",
        "plain torch us": "{plain_us:.1f}",
        "plain / kernel": "**{speedup:.2f}**",
        "of the roofline": "{of_roofline:.0%}",
        "largest difference": "{max_abs_difference:.1e}",
    }
    return table(columns, result["steps"])


def main() -> None:
    """Time all steps, and print them."""
    chosen = options("bench.kernels", __doc__, device="cuda", batches=[1, 32], dtype="bfloat16")
    device = chosen.device
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, chosen.dtype)
    rows, cases = [], Cases()
    with torch.inference_mode():
        rates = measure_rates(dtype, device)
        for where, group in all_steps(chosen.batches, dtype, device):
            with cases.case(where["model"], f"stage {where['stage']}"):
                for step in group:
                    with cases.case(where["model"], step.name):
                        rows.append(where | compare(step, rates))
                        note(**rows[-1])
    facts = {"copied_bytes_per_s": rates.bytes, "flops_per_s": rates.flops}
    publish(f"kernels-{device}-{chosen.dtype}", tables, chosen, **facts, steps=rows)
    cases.end()


if __name__ == "__main__":
    main()
