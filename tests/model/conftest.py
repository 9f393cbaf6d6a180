"""Small networks of every kind."""

from dataclasses import replace

import pytest

from model import DAT, VARIANTS
from tests.conftest import SMALL_DAT, recipe_state

NANO = VARIANTS["dat_nano"]
CONFIGS = {
    "dat": SMALL_DAT,
    "dat_pp": NANO,
    "deformable_detr": replace(
        NANO,
        stages=tuple(
            replace(stage, blocks=stage.blocks.replace("D", "Q"), points=4) for stage in NANO.stages
        ),
    ),
}


@pytest.fixture(params=["dat", "dat_pp", pytest.param("deformable_detr", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest) -> DAT:
    """A network with the weights of the recipe, in evaluation mode."""
    config = CONFIGS[request.param]
    network = DAT(config).eval()
    network.load_state_dict(recipe_state(config))
    return network
