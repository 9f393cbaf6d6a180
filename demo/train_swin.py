"""Trains `swin_nano` on the scenes of `dat_nano`: `python -m demo.train_swin`.

It is there to compare with: the same scenes, input and channels, and windows of as many keys as
`dat_nano` has sampling points. The loss is cross-entropy, the outline of `demo.train`, and how far
the tokens are from those of `dat_nano`, which has learned the same from more; there are no points
to guide. Needs the extra `swin`.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo.scenes import CLASSES
from demo.train import (
    BATCH,
    LABEL_SMOOTHING,
    OUTLINE_WEIGHT,
    TRAINING_SEED,
    VALIDATION_SEED,
    OutlineHead,
    Pool,
    accuracy,
    batches,
    initialise,
    optimise,
    render,
)
from demo.train import CHECKPOINT as TEACHER
from model import load_model
from model.checkpoint import read, write
from model.normalise import Normalise
from model.swin import Swin, SwinFile, create_swin
from model.swin_config import SwinConfig

CONFIG = SwinConfig(
    "swin_nano",
    dim=16,
    depths=(2, 2, 2, 2),
    heads=(1, 2, 4, 8),
    window=4,
    image_size=(128, 128),
    num_classes=len(CLASSES),
    crop=True,
)
CHECKPOINT = Path(__file__).parent / "swin_nano.safetensors"
LAST_BLOCK = "swin.encoder.layers.{stage}.blocks.1"
OUTLINED = 2  # the stage whose tokens draw the outline
IMITATED = (1, 2, 3)  # the stages whose tokens shall be those of `dat_nano`
IMITATION_WEIGHT = 1.0


class Imitation(nn.Module):
    """Compares tokens with those of `dat_nano` at the same place; thrown away after training.

    The two have as many channels in every stage, which need not mean the same: a linear layer is
    between them.
    """

    def __init__(self, model: Swin) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Linear(CONFIG.channels(stage), CONFIG.channels(stage)) for stage in IMITATED
        )
        # In a list, it is no part of what is trained.
        self._teacher = [load_model(read(TEACHER)).requires_grad_(requires_grad=False)]
        self._tokens: dict[int, Tensor] = {}
        for stage in IMITATED:
            block = model.network.get_submodule(LAST_BLOCK.format(stage=stage))
            block.register_forward_hook(partial(self._keep, stage))

    def _keep(self, stage: int, _: nn.Module, __: object, output: tuple[Tensor, ...]) -> None:
        self._tokens[stage] = output[0]

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared difference of the tokens of the last pass, which was over these images."""
        with torch.no_grad():
            maps = self._teacher[0].stage_maps(images).maps
        differences = []
        for stage, projection in zip(IMITATED, self.projections, strict=True):
            ours = projection(self._tokens[stage].view(maps[stage].shape))
            theirs = F.layer_norm(maps[stage], maps[stage].shape[-1:])
            differences.append(F.mse_loss(ours, theirs))
        return torch.stack(differences).mean()


def train(model: Swin, pool: Pool, validation: Pool, steps: int) -> None:
    """Initialise and train in place, printing losses and validation accuracy as it goes."""
    generator = torch.Generator().manual_seed(TRAINING_SEED)
    outlined = model.network.get_submodule(LAST_BLOCK.format(stage=OUTLINED))
    head = OutlineHead(outlined, CONFIG.channels(OUTLINED))
    imitation = Imitation(model)
    trained = (model, head, imitation)
    for module in trained:
        initialise(module, generator)
    optimizer, schedule = optimise(trained, steps)
    normalise = Normalise()
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(batches(pool, steps, generator)):
        images = normalise(batch.pixels)
        logits = model(images)
        classification = F.cross_entropy(logits, batch.labels, label_smoothing=LABEL_SMOOTHING)
        outline = head.loss(batch.coverage)
        optimizer.zero_grad()
        imitated = imitation.loss(images)
        (classification + OUTLINE_WEIGHT * outline + IMITATION_WEIGHT * imitated).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            line = {
                "step": step + 1,
                "seconds": round(time.monotonic() - started),
                "cross_entropy": round(classification.item(), 4),
                "outline": round(outline.item(), 4),
                "imitation": round(imitated.item(), 4),
            }
            if step % 1000 == 999 or step == steps - 1:
                line["validation_accuracy"] = round(accuracy(model, validation), 4)
            print(json.dumps(line), flush=True)


def keep(path: Path, model: Swin, training: dict[str, str]) -> None:
    """Write what was trained, with its configuration and classes, as the server reads it."""
    with TemporaryDirectory() as folder:
        model.network.save_pretrained(folder)  # which knows the names of its files
        state = read(Path(folder) / "model.safetensors").state
        file = SwinFile(CONFIG, state, json.dumps(CLASSES))
        write(path, file.state, {**file.facts, **training})


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
    model = create_swin(CONFIG)
    train(model, pool, validation, arguments.steps)
    training = {
        "seed": str(TRAINING_SEED),
        "steps": str(arguments.steps),
        "batch": str(BATCH),
        "scenes": str(arguments.scenes),
    }
    keep(arguments.out, model, training)


if __name__ == "__main__":
    main()
