from typing import Any

import numpy as np
import pytest
import torch

from model.config import DatConfig, StageConfig
from model.detection import Detector, DetectorConfig
from model.detection.config import Kind
from model.detection.official import official_shapes
from tests.conftest import GOLDEN
from tests.model.detection import recipe

# All kinds of blocks, at a size that costs a test little.
SMALL_BACKBONE = DatConfig(
    "small_dat_pp",
    "dat_pp",
    (
        StageConfig("ND", 16, 2, 1, 8, 9),
        StageConfig("ND", 16, 2, 1, 4, 7),
        StageConfig("ND", 32, 4, 2, 2, 5),
        StageConfig("DD", 32, 4, 2, 1, 3),
    ),
    (96, 96),
    96,
)
KINDS: tuple[Kind, ...] = ("retinanet", "mask_rcnn", "cascade_mask_rcnn")

# Spread the scores and moderate the moves, as the golden cases do for the published sizes.
LIVELY = [
    ["bbox_head.retina_cls.weight", "scale", 6],
    ["bbox_head.retina_cls.bias", "shift", -3],
    ["*fc_cls.weight", "scale", 8],
    ["*_reg.weight", "scale", 0.3],
]


def small_config(kind: Kind) -> DetectorConfig:
    return DetectorConfig(
        f"small_{kind}", kind, SMALL_BACKBONE, num_classes=5, channels=16, hidden=32
    )


def detector_state(config: DetectorConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Recipe weights under the official names."""
    return {
        key: torch.from_numpy(recipe.tensor(key, shape, seed, LIVELY, {}))
        for key, shape in official_shapes(config).items()
    }


def small_detector(kind: Kind) -> Detector:
    """A detector with recipe weights at a size that costs a test little."""
    detector = Detector(small_config(kind)).eval()
    detector.load_state_dict(detector_state(detector.config))
    return detector


@pytest.fixture(params=KINDS, scope="module")
def detector(request: pytest.FixtureRequest) -> Detector:
    """A small detector of each kind with recipe weights."""
    return small_detector(request.param)


@pytest.fixture(scope="session")
def operators() -> Any:
    """Single operators as the official stack computes them."""
    return np.load(GOLDEN / "det" / "ops.npz")
