"""Deterministic weights for timing; speed does not depend on their values."""

import torch
from torch import Tensor

from bench.baseline import create_baseline
from tests import recipe


def recipe_state(name: str) -> dict[str, Tensor]:
    """The complete state dict of a published model, with official keys and random weights."""
    model = create_baseline(name)
    parameters = {
        key: torch.from_numpy(recipe.tensor(key, tuple(parameter.shape), 0))
        for key, parameter in model.named_parameters()
    }
    return dict(model.state_dict()) | parameters
