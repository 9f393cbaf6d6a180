"""Trains `dat_nano` on generated scenes: `python -m demo.train`.

The loss is cross-entropy and two terms that the published models do not have, see `guidance` and
`OutlineHead`. Everything is seeded; rounding still differs between machines and thread counts, so
another run gives other weights of the same quality.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo.scenes import CLASSES
from demo.views import View, location, upload, view
from model import DAT, VARIANTS, create_model
from model.attention import DeformableAttention
from model.checkpoint import write
from model.local_attention import LocalAttention
from model.normalise import Normalise

CONFIG = VARIANTS["dat_nano"]
# Of the picture, as a sampling location.
MIDDLE = location(np.full(2, CONFIG.image_size[0] / 2), CONFIG)[0].item()
CHECKPOINT = Path(__file__).parent / "dat_nano.safetensors"

TRAINING_SEED = 0
VALIDATION_SEED = 2
LARGEST_PICTURE = 320
BATCH = 32
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 200
LABEL_SMOOTHING = 0.05
GUIDANCE_WEIGHT = 0.3
OUTLINE_WEIGHT = 1.0
# Points closer to the object's centre than this share of its radius are left alone.
GUIDANCE_SHARE = 0.7


@dataclass(frozen=True)
class Pool:
    """Training examples in memory.

    Attributes:
        pixels: uint8 `(N, R, R, 3)`.
        labels: int64 `(N,)`.
        centres_yx: float32 `(N, 2)`, in coordinates of sampling locations.
        radii: float32 `(N,)`, in the same unit.
        coverage: uint8 `(N, R / 4, R / 4)`, see `View`.
    """

    pixels: Tensor
    labels: Tensor
    centres_yx: Tensor
    radii: Tensor
    coverage: Tensor

    def take(self, rows: Tensor) -> "Pool":
        """Return the given examples."""
        return Pool(*(getattr(self, field.name)[rows] for field in fields(self)))


def render(seed: int, count: int) -> Pool:
    """Render the first `count` scenes of a series, in two processes."""
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        jobs = [(seed, index) for index in range(count)]
        views = workers.starmap(_render_one, jobs, chunksize=256)
    return Pool(
        torch.from_numpy(np.stack([v.pixels for v in views])),
        torch.tensor([v.label for v in views]),
        torch.from_numpy(np.stack([v.centre_yx for v in views])),
        torch.tensor([v.radius for v in views]),
        torch.from_numpy(np.stack([v.coverage for v in views])),
    )


def _render_one(seed: int, index: int) -> View:
    return view(*upload(seed, index, LARGEST_PICTURE), CONFIG)


def augment(batch: Pool, generator: torch.Generator) -> Pool:
    """Flip, transpose and permute the colours of a batch, each eighth of it in its own way."""
    parts = []
    for rows in torch.arange(len(batch.labels)).chunk(8):
        part = batch.take(rows)
        flip_y, flip_x, swap = torch.randint(2, (3,), generator=generator).tolist()
        axes = [axis for axis, flip in ((1, flip_y), (2, flip_x)) if flip]
        pixels = part.pixels.flip(axes).transpose(1, 1 + swap)
        colours = torch.randperm(3, generator=generator).tolist()
        # The coordinates of sampling locations are not symmetric around the picture's middle.
        direction = torch.tensor([1 - 2 * flip_y, 1 - 2 * flip_x])
        centres = MIDDLE + (part.centres_yx - MIDDLE) * direction
        parts.append(
            replace(
                part,
                pixels=torch.stack([pixels[..., colour] for colour in colours], -1),
                centres_yx=centres.flip(1) if swap else centres,
                coverage=part.coverage.flip(axes).transpose(1, 1 + swap),
            )
        )
    return Pool(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(batch))
    )


def guidance(sampling_locations: Tensor, centres_yx: Tensor, radii: Tensor) -> Tensor:
    """Mean distance by which sampling points miss the object.

    The distance from a point to the object's centre, less `GUIDANCE_SHARE` of the object's
    radius, and 0 inside that circle. It uses the known place of the object: the published
    models have no such term.

    Args:
        sampling_locations: `(B, G, Hk, Wk, 2)`, (y, x).
        centres_yx: `(B, 2)`.
        radii: `(B,)`.
    """
    distances = torch.linalg.vector_norm(
        sampling_locations - centres_yx[:, None, None, None], dim=-1
    )
    return F.relu(distances - GUIDANCE_SHARE * radii[:, None, None, None]).mean()


class OutlineHead(nn.Module):
    """Draws the object from the tokens of the third stage; thrown away after training.

    It teaches the early stages what an outline is, far sooner than the class alone does.

    Args:
        stage: what gives these tokens first, `(B, R / 16, R / 16, dim)` or with both sides in one.
        dim: their channels.
    """

    def __init__(self, stage: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.cells = nn.LayerNorm(dim), nn.Linear(dim, 16)
        self.tokens = torch.empty(0)
        stage.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        self.tokens = output[0]

    def loss(self, coverage: Tensor) -> Tensor:
        """Cross-entropy of the drawing against the coverage `(B, R / 4, R / 4)`."""
        side = coverage.shape[1] // 4
        tokens = self.tokens.view(len(coverage), side, side, -1)
        # (B, 16, R / 16, R / 16) to (B, 1, R / 4, R / 4)
        drawn = F.pixel_shuffle(self.cells(self.norm(tokens)).permute(0, 3, 1, 2), 4)
        return F.binary_cross_entropy_with_logits(drawn[:, 0], coverage / 255)


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all parameters: unit norms, zero biases, weights of variance 1 / fan-in.

    Sampling points start near their reference points. Queries are smaller by the square root
    of their head's channels: the model computes with scaled queries (`model.checkpoint`).
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
            elif name == "bias":
                nn.init.zeros_(parameter)
            else:
                table = not isinstance(module, nn.Linear | nn.Conv2d)
                std = 0.02 if table else parameter[0].numel() ** -0.5
                nn.init.trunc_normal_(
                    parameter, std=std, a=-2 * std, b=2 * std, generator=generator
                )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module.offset_proj.weight *= 0.02
            if isinstance(module, LocalAttention | DeformableAttention):
                channels = module.proj.in_features
                queries = (module.qkv if isinstance(module, LocalAttention) else module.q).weight
                queries[:channels] *= (channels / module.heads) ** -0.5


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero, as a share of the peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))


def batches(pool: Pool, steps: int, generator: torch.Generator) -> Iterator[Pool]:
    """Yield `steps` augmented batches, epoch after epoch in a new order."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(pool.labels), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        yield augment(pool.take(rows), generator)


def optimise(
    modules: Sequence[nn.Module], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What moves the parameters of some modules, and how its learning rate goes."""
    trained = [parameter for module in modules for parameter in module.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim in {2, 4}]},
        {"params": [p for p in trained if p.ndim in {1, 3}], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, steps)
    )


def train(model: DAT, pool: Pool, validation: Pool, steps: int) -> None:
    """Initialise and train in place, printing losses and validation accuracy as it goes."""
    generator = torch.Generator().manual_seed(TRAINING_SEED)
    head = OutlineHead(model.stages[2], model.config.stages[2].dim)
    for module in (model, head):
        initialise(module, generator)
    optimizer, schedule = optimise((model, head), steps)
    normalise = Normalise()
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(batches(pool, steps, generator)):
        explained = model.forward_explained(normalise(batch.pixels))
        classification = F.cross_entropy(
            explained.logits, batch.labels, label_smoothing=LABEL_SMOOTHING
        )
        guide = guidance(explained.sampling_locations[-1], batch.centres_yx, batch.radii)
        outline = head.loss(batch.coverage)
        optimizer.zero_grad()
        (classification + GUIDANCE_WEIGHT * guide + OUTLINE_WEIGHT * outline).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            line = {
                "step": step + 1,
                "seconds": round(time.monotonic() - started),
                "cross_entropy": round(classification.item(), 4),
                "guidance": round(guide.item(), 4),
                "outline": round(outline.item(), 4),
            }
            if step % 1000 == 999 or step == steps - 1:
                line["validation_accuracy"] = round(accuracy(model, validation), 4)
            print(json.dumps(line), flush=True)


@torch.inference_mode()
def accuracy(model: nn.Module, pool: Pool) -> float:
    """Return the share of examples classified right."""
    model.eval()
    normalise, right = Normalise(), 0
    for rows in torch.arange(len(pool.labels)).split(BATCH):
        part = pool.take(rows)
        right += int((model(normalise(part.pixels)).argmax(1) == part.labels).sum())
    model.train()
    return right / len(pool.labels)


def main() -> None:
    """Render, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3_500)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    pool = render(TRAINING_SEED, arguments.scenes)
    validation = render(VALIDATION_SEED, 1200)
    model = create_model(CONFIG.name)
    train(model, pool, validation, arguments.steps)
    facts = {
        "variant": CONFIG.name,
        "labels": json.dumps(CLASSES),
        "seed": str(TRAINING_SEED),
        "steps": str(arguments.steps),
        "batch": str(BATCH),
        "scenes": str(arguments.scenes),
        "guidance_weight": str(GUIDANCE_WEIGHT),
    }
    write(arguments.out, model.state_dict(), facts)


if __name__ == "__main__":
    main()
