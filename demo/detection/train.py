"""Trains `mask_rcnn_dat_nano` on generated scenes: `python -m demo.detection.train`.

The backbone starts from the classifier of this repository. Everything is seeded; rounding still
differs between machines and thread counts, so another run gives other weights of the same quality.
A run that was stopped goes on with `--resume`.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from demo.detection.evaluate import CHECKPOINT, evaluate
from demo.detection.losses import Batch, losses
from demo.detection.scenes import CLASSES, LONGEST, Scene, upload
from demo.detection.views import CONFIG, view
from demo.train import CHECKPOINT as CLASSIFIER
from demo.train import initialise, learning_rate
from model.checkpoint import read, write
from model.detection import Detector, create_detector
from model.detection.roi_heads import BoxHead, TwoStageHead

TRAINING_SEED = 0
VALIDATION_SEED = 2
VALIDATION_SCENES = 120
BATCH = 16
# Of the new layers, and of the backbone.
LEARNING_RATES = (1e-3, 4e-4)
WEIGHT_DECAY = 0.05
LARGEST_GRADIENT = 5.0
WEIGHTS = {
    "objectness": 1.0,
    "proposals": 1.0,
    "classes": 1.0,
    "boxes": 1.0,
    "masks": 1.0,
    "guidance": 0.5,
}


def render(indices: Iterable[int]) -> list[Scene]:
    """Render scenes of the training as the detector sees them."""
    return [view(*upload(TRAINING_SEED, index)) for index in indices]


def augment(seen: Scene, generator: np.random.Generator, *, upright: bool) -> Scene:
    """Flip a view, permute its colours, and turn it if it stands or lies otherwise than asked."""
    pixels, instances = seen.pixels[..., generator.permutation(3)], seen.instances
    flips = tuple(slice(None, None, step) for step in generator.choice((-1, 1), 2))
    pixels, instances = pixels[flips], instances[flips]
    height, width = instances.shape
    if (height > width) != upright and height != width:
        pixels, instances = pixels.transpose(1, 0, 2), instances.T
    return replace(seen, pixels=pixels, instances=instances)


class Batches:
    """Augmented batches of one process; those of a step have the same padded size in all."""

    def __init__(self, views: list[Scene], rank: int) -> None:
        self.rank = rank
        self.landscapes: dict[tuple[int, int], list[Scene]] = defaultdict(list)
        for seen in views:
            short, long = sorted(CONFIG.resizing(seen.instances.shape).padded)
            self.landscapes[short, long].append(seen)

    def at(self, step: int, count: int) -> Batch:
        """So many images for a step."""
        common = np.random.default_rng((TRAINING_SEED, step))
        # Distributed as the sides of the scenes.
        landscape = CONFIG.resizing((1000, int(1000 * common.uniform(1, LONGEST)))).padded
        upright = bool(common.integers(2))
        generator = np.random.default_rng((TRAINING_SEED, step, self.rank))
        group = self.landscapes[landscape]
        chosen = [
            augment(group[index], generator, upright=upright)
            for index in generator.integers(len(group), size=count)
        ]
        return Batch.of(chosen, landscape[::-1] if upright else landscape)


def new_detector(generator: torch.Generator) -> Detector:
    """The detector before its training, with the backbone of the classifier."""
    detector = create_detector(CONFIG.name)
    for module in (detector.backbone.norms, detector.fpn, detector.head):
        initialise(module, generator)
    head = detector.head
    assert isinstance(head, TwoStageHead)
    # Small, so that the first answers are near to undecided.
    (box_head,) = head.box_heads
    assert isinstance(box_head, BoxHead)
    for layer in (head.rpn.objectness, head.rpn.boxes, box_head.classes, box_head.boxes):
        nn.init.normal_(layer.weight, std=0.01, generator=generator)
    backbone = {
        name: tensor
        for name, tensor in read(CLASSIFIER).state.items()
        if name.startswith(("stem.", "stages.", "downsamples."))
    }
    missing, unexpected = detector.backbone.load_state_dict(backbone, strict=False)
    assert not unexpected
    assert all(name.startswith("norms.") for name in missing)
    return detector


def make_optimizer(detector: Detector) -> torch.optim.Optimizer:
    """AdamW with a peak learning rate for each group."""
    backbone = {id(p) for p in detector.backbone.parameters()}
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p
                for p in detector.parameters()
                if (id(p) in backbone) == of_backbone and (p.ndim in {2, 4}) == decays
            ],
            "peak": LEARNING_RATES[of_backbone],
            "weight_decay": WEIGHT_DECAY * decays,
        }
        for of_backbone in (False, True)
        for decays in (False, True)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


class Training:
    """A detector on its way, with all that a run needs to go on.

    Every process has one and takes its share of each batch; the gradients are those of all.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.detector = new_detector(torch.Generator().manual_seed(TRAINING_SEED))
        self.optimizer = make_optimizer(self.detector)
        self.generator = torch.Generator()

    def advance(self, batch: Batch, rank: int = 0) -> dict[str, float]:
        """Take one step, and return the terms of the loss."""
        self.generator.manual_seed(self.step << 8 | rank)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(self.step, self.steps)
        terms = vars(losses(self.detector, batch, self.generator))
        self.optimizer.zero_grad()
        torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum().backward()
        if distributed.is_initialized():
            self._share_gradients()
        nn.utils.clip_grad_norm_(self.detector.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.step += 1
        return {name: term.item() for name, term in terms.items()}

    def _share_gradients(self) -> None:
        gradients = [p.grad for p in self.detector.parameters() if p.grad is not None]
        common = nn.utils.parameters_to_vector(gradients)
        distributed.all_reduce(common)
        nn.utils.vector_to_parameters(common / distributed.get_world_size(), gradients)

    def save(self, path: Path) -> None:
        """Write the state of the run."""
        state = {
            "step": self.step,
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a state that was written."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Train in one of the processes; the first prints losses and average precision as it goes."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=options.processes
    )
    run = Training(options.steps)
    if options.resume:
        run.load(options.state)
    data = Batches(render(range(rank, options.scenes, options.processes)), rank)
    validation = [upload(VALIDATION_SEED, index) for index in range(VALIDATION_SCENES)]
    run.detector.train()
    started = time.monotonic()
    while run.step < run.steps:
        terms = run.advance(data.at(run.step, BATCH // options.processes), rank)
        if rank:
            continue
        if run.step % 50 == 0:
            line = {"step": run.step, "seconds": round(time.monotonic() - started)}
            print(json.dumps(line | {k: round(v, 4) for k, v in terms.items()}), flush=True)
        if run.step % 500 == 0 or run.step == run.steps:
            run.save(options.state)
            run.detector.eval()
            print(json.dumps(evaluate(run.detector, validation)), flush=True)
            run.detector.train()
    distributed.destroy_process_group()
    if rank == 0:
        facts = {
            "variant": CONFIG.name,
            "labels": json.dumps(CLASSES),
            "seed": str(TRAINING_SEED),
            "steps": str(options.steps),
            "batch": str(BATCH),
            "scenes": str(options.scenes),
            "loss_weights": json.dumps(WEIGHTS),
        }
        write(options.out, run.detector.state_dict(), facts)


def main() -> None:
    """Render, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4_200)
    parser.add_argument("--scenes", type=int, default=7_000)
    parser.add_argument("--processes", type=int, default=2, help="with one thread each")
    parser.add_argument("--state", type=Path, default=Path("mask_rcnn_dat_nano.state"))
    parser.add_argument("--resume", action="store_true", help="go on from the state")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        spawn(train, (options, meeting), nprocs=options.processes)


if __name__ == "__main__":
    main()
