"""The baseline is a second implementation of both models: it must reproduce the official logits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.baseline import create_baseline
from bench.weights import recipe_state
from tests import recipe

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    "name", ["dat_tiny_224", pytest.param("dat_pp_tiny_224", marks=pytest.mark.slow)]
)
def test_baseline_reproduces_the_official_logits(name: str) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(golden["meta"]))
    images = recipe.batch(meta["input_seed"], meta["image_indices"], *meta["input_hw"])
    model = create_baseline(name)
    model.load_state_dict(model.state_dict() | recipe_state(name))

    with torch.inference_mode():
        logits = model(torch.from_numpy(images))

    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=0, atol=5e-5)
