"""Trains `semantic_fpn_dat_nano` on generated scenes: `python -m demo.segmentation.train`.

The backbone and the feature pyramid start from the detector of this repository, and the loss is the
cross-entropy of every pixel. Everything is seeded; rounding still differs between machines and
thread counts, so another run gives other weights of the same quality. A run that was stopped goes
on with `--resume`.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from demo.detection.evaluate import CHECKPOINT as DETECTOR
from demo.detection.scenes import Scene
from demo.detection.views import decoded, view
from demo.segmentation.maps import NAMES, labels, upload
from demo.train import initialise, learning_rate
from model.checkpoint import read, write
from model.normalise import Normalise
from model.segmentation import SEGMENTERS, Segmenter, create_segmenter, segment

CONFIG = SEGMENTERS["semantic_fpn_dat_nano"]
CHECKPOINT = Path(__file__).parent / "semantic_fpn_dat_nano.safetensors"

TRAINING_SEED = 0
VALIDATION_SEED = 2
VALIDATION_SCENES = 120
BATCH = 8
CROP = CONFIG.scale[1]  # pixels a side: the shorter one of every picture
# Of the head, and of the backbone.
LEARNING_RATES = (1e-3, 8e-4)
WEIGHT_DECAY = 0.05
LARGEST_GRADIENT = 5.0
# Of a pixel of an object, where one of the background has 1: what is hard is to tell shapes apart.
OBJECT_WEIGHT = 2.0
AUXILIARY_STAGE, AUXILIARY_WEIGHT = 2, 0.4


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
    """The segmenter before its training, with the backbone and the pyramid of the detector."""
    segmenter = create_segmenter(CONFIG.name)
    initialise(segmenter.decode_head, generator)
    classes = segmenter.decode_head.classes
    assert isinstance(classes, nn.Linear)
    # Small, so that the first answers are near to undecided.
    nn.init.normal_(classes.weight, std=0.01, generator=generator)
    detector = read(DETECTOR).state
    begun = {"backbone.": segmenter.backbone, "fpn.": segmenter.decode_head.pyramid}
    for prefix, part in begun.items():
        assert isinstance(part, nn.Module)
        part.load_state_dict({name: detector[prefix + name] for name in part.state_dict()})
    return segmenter


def make_optimizer(segmenter: Segmenter, auxiliary: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a peak learning rate for each group."""
    backbone = {id(p) for p in segmenter.backbone.parameters()}
    parameters = [*segmenter.parameters(), *auxiliary.parameters()]
    groups: list[dict[str, Any]] = [
        {
            "params": [
                p
                for p in parameters
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
        generator = torch.Generator().manual_seed(TRAINING_SEED)
        self.segmenter = new_segmenter(generator)
        # Names the classes from a map of the backbone, as UPerNet's does, and is thrown away.
        self.auxiliary = nn.Linear(CONFIG.dims[AUXILIARY_STAGE], CONFIG.num_classes)
        initialise(self.auxiliary, generator)
        self.optimizer = make_optimizer(self.segmenter, self.auxiliary)
        self.weights = torch.full((CONFIG.num_classes,), OBJECT_WEIGHT)
        self.weights[0] = 1.0
        self.normalise = Normalise()

    def loss(self, pixels: Tensor, of_pixels: Tensor) -> Tensor:
        """Mean cross-entropy of the head, and of the auxiliary one."""
        images = self.normalise(pixels)
        maps = self.segmenter.backbone_for((CROP, CROP))(images).maps
        # The pixels of every other row and column, by turns: a quarter of the work.
        of_pixels = of_pixels[:, self.step % 2 :: 2, self.step // 2 % 2 :: 2]
        main = self._cross_entropy(self.segmenter.decode_head(maps), of_pixels)
        auxiliary = self._cross_entropy(self.auxiliary(maps[AUXILIARY_STAGE]), of_pixels)
        return main + AUXILIARY_WEIGHT * auxiliary

    def _cross_entropy(self, logits: Tensor, of_pixels: Tensor) -> Tensor:
        """Of logits `(B, h, w, K)` of cells and labels of pixels that lie between them."""
        at_pixels = F.interpolate(logits.permute(0, 3, 1, 2), of_pixels.shape[1:], mode="bilinear")
        return F.cross_entropy(at_pixels, of_pixels, self.weights)

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
            "auxiliary": self.auxiliary.state_dict(),
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
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.optimizer.load_state_dict(state["optimizer"])


@torch.inference_mode()
def mean_iou(segmenter: Segmenter, uploads: Iterable[tuple[Scene, bytes]]) -> float:
    """Mean over classes of the pixels of scenes that are right, of those found or to be found."""
    confusion = np.zeros((CONFIG.num_classes,) * 2, np.int64)
    for rendered, file in uploads:
        found = segment(segmenter, decoded(file)).labels.numpy().astype(np.int64)
        np.add.at(confusion, (labels(rendered), found), 1)
    right = confusion.diagonal()
    return float((right / (confusion.sum(0) + confusion.sum(1) - right)).mean())


def main() -> None:
    """Render, train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--scenes", type=int, default=5_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=Path("semantic_fpn_dat_nano.state"))
    parser.add_argument("--resume", action="store_true", help="go on from the state")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Training(options.steps)
    if options.resume:
        run.load(options.state)
    examples = render(options.scenes)
    validation = [upload(VALIDATION_SEED, index) for index in range(VALIDATION_SCENES)]
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
            run.segmenter.eval()
            print(json.dumps({"mIoU": round(mean_iou(run.segmenter, validation), 4)}), flush=True)
            run.segmenter.train()
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
