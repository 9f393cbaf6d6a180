"""Trains `semantic_fpn_dat_nano` on generated scenes: `python -m demo.segmentation.train`.

The backbone starts from the classifier of this repository, and the loss is the cross-entropy of
every pixel. Everything is seeded; rounding still differs between machines and thread counts, so
another run gives other weights of the same quality. A run that was stopped goes on with `--resume`.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from demo.detection.scenes import Scene, upload
from demo.detection.views import view
from demo.segmentation.maps import NAMES, labels
from demo.train import CHECKPOINT as CLASSIFIER
from demo.train import initialise, learning_rate
from model.checkpoint import read, write
from model.normalise import Normalise
from model.segmentation import SEGMENTERS, Segmenter, create_segmenter

CONFIG = SEGMENTERS["semantic_fpn_dat_nano"]
CHECKPOINT = Path(__file__).parent / "semantic_fpn_dat_nano.safetensors"

TRAINING_SEED = 0
BATCH = 16
CROP = CONFIG.scale[1]  # pixels a side: the shorter one of every picture
# Of the new layers, and of the backbone.
LEARNING_RATES = (1e-3, 4e-4)
WEIGHT_DECAY = 0.05
LARGEST_GRADIENT = 5.0


@dataclass(frozen=True)
class Example:
    """A picture as the segmenter sees it.

    Attributes:
        pixels: uint8 `(H, W, 3)`.
        labels: uint8 `(H, W)`.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    @classmethod
    def of(cls, seen: Scene) -> "Example":
        """Make it of a scene at the size of the input."""
        return cls(seen.pixels, labels(seen))


def render(count: int) -> list[Example]:
    """Render the first scenes of the training, in two processes."""
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        return workers.map(_render_one, range(count), chunksize=64)


def _render_one(index: int) -> Example:
    # The detector sees pictures at the same size.
    return Example.of(view(*upload(TRAINING_SEED, index)))


def augment(example: Example, generator: np.random.Generator) -> Example:
    """Cut a square, flip and turn it, and permute its colours."""
    top, left = (int(generator.integers(side - CROP + 1)) for side in example.labels.shape)
    window = slice(top, top + CROP), slice(left, left + CROP)
    flips = tuple(slice(None, None, step) for step in generator.choice((-1, 1), 2))
    pixels, of_pixels = example.pixels[window][flips], example.labels[window][flips]
    if generator.integers(2):
        pixels, of_pixels = pixels.transpose(1, 0, 2), of_pixels.T
    return Example(pixels[..., generator.permutation(3)], of_pixels)


def batch(examples: Sequence[Example], step: int) -> tuple[Tensor, Tensor]:
    """Augmented pixels `(B, H, W, 3)` and labels `(B, H, W)` for a step."""
    generator = np.random.default_rng((TRAINING_SEED, step))
    chosen = [
        augment(examples[index], generator)
        for index in generator.integers(len(examples), size=BATCH)
    ]
    pixels = np.stack([example.pixels for example in chosen])
    of_pixels = np.stack([example.labels for example in chosen])
    return torch.from_numpy(pixels), torch.from_numpy(of_pixels).long()


def new_segmenter(generator: torch.Generator) -> Segmenter:
    """The segmenter before its training, with the backbone of the classifier."""
    segmenter = create_segmenter(CONFIG.name)
    for module in (segmenter.backbone.norms, segmenter.decode_head):
        initialise(module, generator)
    classes = segmenter.decode_head.classes
    assert isinstance(classes, nn.Linear)
    # Small, so that the first answers are near to undecided.
    nn.init.normal_(classes.weight, std=0.01, generator=generator)
    backbone = {
        name: tensor
        for name, tensor in read(CLASSIFIER).state.items()
        if name.startswith(("stem.", "stages.", "downsamples."))
    }
    missing, unexpected = segmenter.backbone.load_state_dict(backbone, strict=False)
    assert not unexpected
    assert all(name.startswith("norms.") for name in missing)
    return segmenter


def make_optimizer(segmenter: Segmenter) -> torch.optim.Optimizer:
    """AdamW with a peak learning rate for each group."""
    backbone = {id(p) for p in segmenter.backbone.parameters()}
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p
                for p in segmenter.parameters()
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
    """A segmenter on its way, with all that a run needs to go on."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.segmenter = new_segmenter(torch.Generator().manual_seed(TRAINING_SEED))
        self.optimizer = make_optimizer(self.segmenter)
        self.normalise = Normalise()

    def loss(self, pixels: Tensor, of_pixels: Tensor) -> Tensor:
        """Mean cross-entropy of all pixels."""
        logits = self.segmenter(self.normalise(pixels)).permute(0, 3, 1, 2)
        return F.cross_entropy(
            F.interpolate(logits, of_pixels.shape[1:], mode="bilinear"), of_pixels
        )

    def advance(self, pixels: Tensor, of_pixels: Tensor) -> float:
        """Take one step, and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(self.step, self.steps)
        loss = self.loss(pixels, of_pixels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.segmenter.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write the state of the run."""
        state = {
            "step": self.step,
            "segmenter": self.segmenter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a state that was written."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.segmenter.load_state_dict(state["segmenter"])
        self.optimizer.load_state_dict(state["optimizer"])


def main() -> None:
    """Render, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--scenes", type=int, default=7_000)
    parser.add_argument("--state", type=Path, default=Path("semantic_fpn_dat_nano.state"))
    parser.add_argument("--resume", action="store_true", help="go on from the state")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    run = Training(options.steps)
    if options.resume:
        run.load(options.state)
    examples = render(options.scenes)
    run.segmenter.train()
    started = time.monotonic()
    while run.step < run.steps:
        loss = run.advance(*batch(examples, run.step))
        if run.step % 50 == 0 or run.step == run.steps:
            seconds = round(time.monotonic() - started)
            line = {"step": run.step, "seconds": seconds, "loss": round(loss, 4)}
            print(json.dumps(line), flush=True)
        if run.step % 500 == 0 or run.step == run.steps:
            run.save(options.state)
    facts = {
        "variant": CONFIG.name,
        "classes": json.dumps(CONFIG.num_classes),
        "labels": json.dumps(NAMES),
        "seed": str(TRAINING_SEED),
        "steps": str(options.steps),
        "batch": str(BATCH),
        "scenes": str(options.scenes),
    }
    write(options.out, run.segmenter.state_dict(), facts)


if __name__ == "__main__":
    main()
