"""What the attention of DAT saves, measured: parameters, FLOPs, memory and time of its rivals.

At the shape of each deformable stage four attentions run on the same tokens: that of DAT, whose
queries share their keys; that of Deformable DETR, whose queries have points of their own but no
keys, with 16 points and with as many as DAT has keys; and deformable attention taken literally,
whose queries have sampled keys and values of their own. Then whole models, DAT-T with its own
attention and with that of Deformable DETR.

Memory is what the allocator hands out during one forward pass, beside parameters and input: at
its most, as in inference; and what is still held at the end of a pass that autograd records, as
in training. Times alternate in rounds; the ratio to DAT is taken per round.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.harness import in_turn, options, publish, ratio, time_calls
from bench.machine import describe
from bench.tables import RATIO, Row, table
from model import VARIANTS, DatConfig, create_model
from model.attention import DeformableAttention, sample_features
from model.cost import attention_flops, cost
from model.dat import make_attention
from model.official import official_shapes

LAYERS = {"dat_tiny_224": (2, 3), "dat_pp_tiny_224": (0, 1, 2, 3)}
MODELS = ("dat_tiny_224", "dat_tiny_224_ddetr", "dat_tiny_224_ddetr_equal")
POINTS = 16  # as in `dat_tiny_224_ddetr`


class PerQueryAttention(nn.Module):
    """Deformable attention without sharing: every query samples keys and values of its own.

    Offsets and projections are those of DAT, but `H * W * Hk * Wk * C` values are sampled, and
    each is projected. There is no position bias.
    """

    reference_points: Tensor

    def __init__(self, config: DatConfig, stage: int) -> None:
        super().__init__()
        spec = config.stages[stage]
        self.heads, self.offset_groups = spec.heads, spec.offset_groups
        shared = DeformableAttention(config, stage)
        self.keys = prod(shared.reference_points.shape[:2])
        self.q, self.kv, self.proj = shared.q, shared.kv, shared.proj
        self.offset_proj = nn.Linear(spec.dim, spec.offset_groups * self.keys * 2)
        self.register_buffer("reference_points", shared.reference_points.view(-1, 2))

    def forward(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """Attend from the normed tokens `(B, H, W, C)` and add to the residual."""
        B, H, W, C = tokens.shape
        q = self.q(tokens)
        offsets = self.offset_proj(q).view(B, H * W, self.offset_groups, self.keys, 2)
        locations = self.reference_points + offsets.transpose(1, 2)
        sampled = sample_features(tokens, locations)  # (B, HW * Ns, C)
        keys, values = self.kv(sampled).view(B * H * W, self.keys, 2, self.heads, -1).unbind(2)
        attended = F.scaled_dot_product_attention(
            q.view(B * H * W, 1, self.heads, -1).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            scale=1.0,
        )
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(B, H, W, C))
        return residual + projected


def per_query_flops(config: DatConfig, stage: int, keys: int) -> int:
    """FLOPs of `PerQueryAttention`, counted as in `model.cost`."""
    spec, N = config.stages[stage], prod(config.map_size(stage))
    offsets = N * spec.dim * spec.offset_groups * keys * 2
    sampled = N * keys * spec.dim
    return 2 * N * spec.dim**2 + offsets + sampled * (4 + 2 * spec.dim + 2)


@dataclass(frozen=True)
class Contender:
    """One attention or model of a comparison.

    Attributes:
        name: what the table calls it.
        parameters: as published.
        flops: of one image.
        module: from the inputs to anything.
    """

    name: str
    parameters: int
    flops: int
    module: nn.Module


@dataclass(frozen=True)
class Memory:
    """What a forward pass takes from the allocator.

    Attributes:
        peak: bytes, at most at one time.
        held: bytes, at its end.
    """

    peak: int
    held: int


def measure_memory(forward: Callable[[], object], device: torch.device) -> Memory:
    """Measure a forward pass whose parameters and inputs are there already."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = forward()
        torch.cuda.synchronize()
        after, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del kept
        return Memory(most - before, after - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = forward()
    del kept
    total = peak = 0
    for change in _allocations(profiled):
        total += change
        peak = max(peak, total)
    return Memory(peak, total)


def _allocations(profiled: profile) -> Iterator[int]:
    """Bytes that the allocator of the CPU handed out (or, negative, took back), in order."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    return (event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))


def attentions(config: DatConfig, stage: int) -> list[Contender]:
    """The four attentions at the shape of a stage, that of DAT first."""
    literal = PerQueryAttention(config, stage)
    own = sum(parameter.numel() for parameter in literal.parameters())
    return [
        _attention("DAT", config, stage, "D", literal.keys),
        _attention(f"Deformable DETR, {POINTS} points", config, stage, "Q", POINTS),
        _attention("Deformable DETR, equal points", config, stage, "Q", literal.keys),
        Contender("keys of each query", own, per_query_flops(config, stage, literal.keys), literal),
    ]


def _attention(name: str, config: DatConfig, stage: int, kind: str, points: int) -> Contender:
    """The attention of a block with this letter, as the only one of its stage."""
    spec = replace(config.stages[stage], blocks=kind, points=points)
    config = replace(config, stages=(*config.stages[:stage], spec, *config.stages[stage + 1 :]))
    parameters = sum(
        prod(shape)
        for key, shape in official_shapes(config).items()
        if key.startswith(f"stages.{stage}.attns.")
    )
    flops = attention_flops(config, stage, kind)
    return Contender(name, parameters, flops, make_attention(config, stage, kind))


def whole_model(name: str) -> Contender:
    """A whole model, with random weights."""
    network = create_model(name)
    facts = cost(network)
    return Contender(name, facts.parameters, facts.flops, network)


def compare(contenders: list[Contender], *inputs: Tensor, rounds: int, seconds: float) -> list[Row]:
    """Measure memory, then time in alternating rounds; ratios are to the first contender."""
    modules = {one.name: one.module.to(inputs[0].device) for one in contenders}
    memory = {name: measure_both(module, inputs) for name, module in modules.items()}

    def time_passes(module: nn.Module) -> float:
        def compute() -> None:
            module(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()

        with torch.inference_mode():
            return mean(time_calls(compute, seconds))

    sides = {name: partial(time_passes, module) for name, module in modules.items()}
    _, *timed = in_turn(sides, rounds + 1)
    taken = {name: [one[name] for one in timed] for name in modules}
    rows = []
    for contender in contenders:
        inference, training = memory[contender.name]
        rows.append(
            {
                "name": contender.name,
                "parameters": contender.parameters,
                "flops": contender.flops,
                "inference_peak_bytes": inference.peak,
                "training_peak_bytes": training.peak,
                "training_held_bytes": training.held,
                "ms": 1e3 * median(taken[contender.name]),
                **ratio(taken[contender.name], taken[contenders[0].name]),
            }
        )
    return rows


def measure_both(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Memory, Memory]:
    """Memory of a forward pass in inference, and of one that autograd records."""
    module.train()
    module(*inputs)  # what only a first call allocates
    training = measure_memory(lambda: module(*inputs), inputs[0].device)
    module.eval()
    with torch.inference_mode():
        inference = measure_memory(lambda: module(*inputs), inputs[0].device)
    return inference, training


FIGURES = {
    "million parameters": "{parameters:/1e6 .2f}",
    "GFLOPs": "{flops:/1e9 .3f}",
    "inference peak MB": "{inference_peak_bytes:/1e6 .1f}",
    "training held MB": "{training_held_bytes:/1e6 .1f}",
    "training peak MB": "{training_peak_bytes:/1e6 .1f}",
    "ms": "{ms:.2f}",
    "time / DAT (range)": RATIO,
}


def tables(result: Row) -> str:
    """The tables of one `attention_cost-*.json`: attentions by stage (from 0), then models."""
    of_layers = {
        "layer": "{layer[model]}, stage {layer[stage]}, {layer[map]:x}",
        "attention": "{name}",
        **FIGURES,
    }
    rows = (row | {"layer": layer} for layer in result["layers"] for row in layer["rows"])
    models = table({"model": "{name}", **FIGURES}, result["models"])
    return f"{table(of_layers, rows)}\n\n{models}"


def main() -> None:
    """Compare attentions layer by layer, then models."""
    chosen = options(
        "bench.attention_cost",
        __doc__,
        batch=1,
        rounds=7,
        seconds=0.1,
        threads=None,
        device="cpu",
    )
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    batch, device = chosen.batch, chosen.device
    time = {"rounds": chosen.rounds, "seconds": chosen.seconds}
    layers = []
    for name, stages in LAYERS.items():
        config = VARIANTS[name]
        for stage in stages:
            spec, (H, W) = config.stages[stage], config.map_size(stage)
            tokens = torch.randn(batch, H, W, spec.dim, device=device)
            rows = compare(attentions(config, stage), tokens, torch.randn_like(tokens), **time)
            layers.append({"model": name, "stage": stage, "map": [H, W, spec.dim], "rows": rows})
    images = torch.randn(batch, 3, 224, 224, device=device)
    result = {
        "device": device,
        "batch": batch,
        "machine": describe("bench.attention_cost", device),
        "rounds": chosen.rounds,
        "layers": layers,
        "models": compare([whole_model(name) for name in MODELS], images, **time),
    }
    publish(f"attention_cost-{device}", tables, result)


if __name__ == "__main__":
    main()
