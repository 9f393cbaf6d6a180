"""A server with `DAT_LIMITS__DECODE=fast`, beside one that decodes exactly."""

import numpy as np
import pytest

from demo.views import upload
from tests.clients import over_grpc, over_http
from tests.server import start_server

SERIES = 1_000_033  # of no other use in this repository
LARGEST_SIDE = 900


@pytest.fixture(scope="module")
def fast_server():
    with start_server(DAT_MODEL__NAME="dat_nano", DAT_LIMITS__DECODE="fast") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("classify", [over_http, over_grpc])
async def test_answers_of_fast_decoding_are_near_the_exact_ones(server, fast_server, classify):
    scenes = [upload(SERIES, index, LARGEST_SIDE) for index in range(12)]
    files = [file for _, file in scenes]
    exact = await classify(server, files, explain="points", top_k=12)
    fast = await classify(fast_server, files, explain="points", top_k=12)
    others = 0
    for (scene, _), ours, theirs in zip(scenes, fast.results, exact.results, strict=True):
        height, width = scene.pixels.shape[:2]
        assert ours.size == theirs.size == (width, height)
        assert ours.predictions[0][:2] == theirs.predictions[0][:2]
        others += ours.predictions != theirs.predictions
        for layer, expected in zip(ours.layers, theirs.layers, strict=True):
            np.testing.assert_array_equal(layer.reference_points, expected.reference_points)
            moved = layer.sampling_locations - expected.sampling_locations
            assert np.abs(moved).mean() < 0.01 * max(width, height)
    # of these pictures most are at least twice the 146 pixels that the model needs
    assert others > 6
