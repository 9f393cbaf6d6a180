"""Deterministic weights for timing.

The speed of networks does not depend on the values; how much the post-processing of a detector
has to do does.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import VARIANTS
from model.checkpoint import Checkpoint
from model.detection import DETECTORS, Detector, create_detector, load_detector
from model.detection import official as detector_official
from model.official import official_shapes
from service.models.load import BUNDLED
from tests import recipe
from tests.model.detection import recipe as detector_recipe

_GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "det"
DETECTOR_CASES = {
    "retinanet_dat_pp_tiny": "rtn_tiny",
    "mask_rcnn_dat_pp_tiny": "mrcn_tiny",
    "cascade_mask_rcnn_dat_pp_tiny": "cmrcn_tiny",
}


def recipe_state(name: str) -> dict[str, Tensor]:
    """Random weights of a variant, with official keys."""
    return {
        key: torch.from_numpy(recipe.tensor(key, shape, 0))
        for key, shape in official_shapes(VARIANTS[name]).items()
    }


def recipe_checkpoint(name: str) -> Checkpoint:
    """These weights as if read from a file."""
    return Checkpoint(Path(f"{name}.pth"), recipe_state(name))


def detector_state(name: str) -> dict[str, Tensor]:
    """The weights of the golden case of a published detector, with official keys.

    They are random with adjustments that spread the scores as training does: unadjusted, every
    place of an image scores alike.
    """
    golden = np.load(_GOLDEN / f"{DETECTOR_CASES[name]}.npz")
    case = json.loads(str(golden["meta"]))
    return {
        key: torch.from_numpy(
            detector_recipe.tensor(key, shape, case["seed"], case["overrides"], golden)
        )
        for key, shape in detector_official.official_shapes(DETECTORS[name]).items()
    }


def make_detector(name: str) -> Detector:
    """A detector with those weights; that of the demo as it is bundled."""
    if name in BUNDLED:
        return load_detector(BUNDLED[name]).detector
    detector = create_detector(name)
    detector.load_state_dict(detector_state(name))
    return detector
