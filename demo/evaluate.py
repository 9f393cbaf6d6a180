"""Measures the bundled model on scenes it was not trained on: `python -m demo.evaluate`.

Each scene goes the way of an uploaded picture: JPEG file, decoding, the official resize and
crop, the model. Prints one line of JSON:

- `accuracy`: share of scenes classified right;
- `points_nearer`: share of the sampling points of the last deformable layer that lie nearer to
  the object's centre than they would without their offset;
- `scenes_with_most_points_nearer`: share of scenes where that holds for more than half of them.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from demo.train import CHECKPOINT, CONFIG, TRAINING_SEED, VALIDATION_SEED
from demo.views import View, upload, view
from model import DAT, create_model
from model.checkpoint import read
from model.transforms import Normalise

BATCH = 50
LARGEST_PICTURE = 480


def bundled_model() -> DAT:
    """Return the bundled model in evaluation mode."""
    model = create_model(CONFIG.name)
    model.load_state_dict(read(CHECKPOINT).state)
    return model


def nearer(model: DAT, sampling_locations: Tensor, views: list[View]) -> Tensor:
    """Tell which sampling points are nearer to the object than without their offset.

    Args:
        model: the model that chose the points.
        sampling_locations: of its last deformable layer, `(B, G, Hk, Wk, 2)`, (y, x).
        views: the `B` scenes.

    Returns:
        bool `(B, G, Hk, Wk)`.
    """
    centres = torch.from_numpy(np.stack([v.centre_yx for v in views]))[:, None, None, None]
    # Not the reference points themselves: DAT++ places some outside the map, and counting their
    # way back onto it would flatter the offsets.
    unmoved = model.deformable_layers[-1].attention.move(torch.zeros_like(sampling_locations[:1]))
    closer: Tensor = torch.linalg.vector_norm(sampling_locations - centres, dim=-1) < (
        torch.linalg.vector_norm(unmoved - centres, dim=-1)
    )
    return closer


@torch.inference_mode()
def evaluate(model: DAT, views: Iterator[View]) -> dict[str, float]:
    """Measure accuracy and where the points went; see the module."""
    normalise = Normalise()
    right, points, majorities = [], [], []
    while batch := list(islice(views, BATCH)):
        pixels = torch.from_numpy(np.stack([v.pixels for v in batch]))
        explained = model.forward_explained(normalise(pixels))
        labels = torch.tensor([v.label for v in batch])
        right.append(explained.logits.argmax(1) == labels)
        share = nearer(model, explained.sampling_locations[-1], batch).float().mean((1, 2, 3))
        points.append(share)
        majorities.append(share > 0.5)
    return {
        "accuracy": torch.cat(right).float().mean().item(),
        "points_nearer": torch.cat(points).mean().item(),
        "scenes_with_most_points_nearer": torch.cat(majorities).float().mean().item(),
    }


def main() -> None:
    """Evaluate the bundled model and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.seed in {TRAINING_SEED, VALIDATION_SEED}:
        parser.error(f"seed {arguments.seed} was used in training")

    views = (
        view(*upload(arguments.seed, index, LARGEST_PICTURE), CONFIG)
        for index in range(arguments.scenes)
    )
    figures = evaluate(bundled_model(), views)
    print(json.dumps({"scenes": arguments.scenes, "seed": arguments.seed} | figures))


if __name__ == "__main__":
    main()
