"""Measures the bundled model on scenes it was not trained on: `python -m demo.evaluate`.

Each scene goes the way of an uploaded picture: JPEG file, decoding, the official resize and
crop, the model. Prints one line of JSON:

- `accuracy`: share of scenes classified right;
- `as_in_float32`: share of scenes for which the best class is that of float32;
- `points_nearer`: share of the sampling points of the last deformable layer that lie nearer to
  the object's centre than they would without their offset;
- `scenes_with_most_points_nearer`: share of scenes where that holds for more than half of them;
- `points_at_object`: share of the points that lie where training draws them, within
  `GUIDANCE_SHARE` of the object's radius from its centre;
- `..._of_another_scene` and `..._without_offset`: the controls, the same share for the points of
  the next scene, which move but not because of this object, and for points that do not move.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from demo.train import CHECKPOINT, CONFIG, GUIDANCE_SHARE, TRAINING_SEED, VALIDATION_SEED
from demo.views import View, upload, view
from model import DAT, create_model
from model.attention import DeformableAttention
from model.checkpoint import read
from model.normalise import Normalise

BATCH = 50
LARGEST_PICTURE = 480


def bundled_model() -> DAT:
    """Return the bundled model in evaluation mode."""
    model = create_model(CONFIG.name)
    model.load_state_dict(read(CHECKPOINT).state)
    return model


@dataclass(frozen=True)
class Objects:
    """Where the objects of `B` scenes are, in coordinates of sampling locations.

    Attributes:
        centres_yx: `(B, 1, 1, 1, 2)`.
        radii: `(B, 1, 1, 1)`.
    """

    centres_yx: Tensor
    radii: Tensor

    @classmethod
    def of(cls, views: list[View]) -> "Objects":
        """The objects of some views."""
        centres_yx = torch.from_numpy(np.stack([v.centre_yx for v in views]))
        return cls(
            centres_yx.view(-1, 1, 1, 1, 2),
            torch.tensor([v.radius for v in views]).view(-1, 1, 1, 1),
        )

    def distances(self, points_yx: Tensor) -> Tensor:
        """Of points `(B, G, Hk, Wk, 2)` from the centres, `(B, G, Hk, Wk)`."""
        distances: Tensor = torch.linalg.vector_norm(points_yx - self.centres_yx, dim=-1)
        return distances


@torch.inference_mode()
def evaluate(
    model: DAT, views: Iterator[View], dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Measure accuracy and where the points went; see the module.

    Args:
        model: in float32.
        views: of the scenes.
        dtype: of the features of the model that is measured.
    """
    exact, normalise, normalise_exact = model, Normalise(dtype), Normalise()
    model = deepcopy(exact).cast(dtype)
    found: dict[str, list[Tensor]] = defaultdict(list)
    while batch := list(islice(views, BATCH)):
        pixels = torch.from_numpy(np.stack([v.pixels for v in batch]))
        explained = model.forward_explained(normalise(pixels))
        labels = torch.tensor([v.label for v in batch])
        best = explained.logits.argmax(1)
        found["accuracy"].append(best == labels)
        found["as_in_float32"].append(best == exact(normalise_exact(pixels)).argmax(1))

        objects, points = Objects.of(batch), explained.sampling_locations[-1]
        # Not the reference points themselves: DAT++ places some outside the map, and counting
        # their way back onto it would flatter the offsets.
        attention = model.deformable_layers[-1].attention
        assert isinstance(attention, DeformableAttention)
        unmoved = attention.move(torch.zeros_like(points))
        own, others, still = map(objects.distances, (points, points.roll(1, 0), unmoved))
        near = GUIDANCE_SHARE * objects.radii
        found["points_nearer"].append(own < still)
        found["points_nearer_of_another_scene"].append(others < still)
        majority = (own < still).double().mean((1, 2, 3)) > 0.5
        found["scenes_with_most_points_nearer"].append(majority)
        found["points_at_object"].append(own < near)
        found["points_at_object_of_another_scene"].append(others < near)
        found["points_at_object_without_offset"].append(still < near)
    return {name: round(torch.cat(hits).double().mean().item(), 4) for name, hits in found.items()}


def main() -> None:
    """Evaluate the bundled model and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    if arguments.seed in {TRAINING_SEED, VALIDATION_SEED}:
        parser.error(f"seed {arguments.seed} was used in training")

    views = (
        view(*upload(arguments.seed, index, LARGEST_PICTURE), CONFIG)
        for index in range(arguments.scenes)
    )
    figures = evaluate(bundled_model(), views, getattr(torch, arguments.dtype))
    print(json.dumps(vars(arguments) | figures))


if __name__ == "__main__":
    main()
