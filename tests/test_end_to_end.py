"""Pictures that nobody trained on, through the running server, against the truth."""

import asyncio

import numpy as np
import pytest

from demo.views import upload
from tests.clients import over_grpc, over_http, over_json, over_stream

SERIES = 1_000_003  # of no other use in this repository
SCENES = 60
LARGEST_SIDE = 640


@pytest.mark.parametrize("classify", [over_http, over_json, over_grpc, over_stream])
async def test_the_demo_model_names_the_object_and_looks_at_it(server, classify):
    scenes = [upload(SERIES, index, LARGEST_SIDE) for index in range(SCENES)]
    answers = await asyncio.gather(
        *(classify(server, [file], explain="points", top_k=1) for _, file in scenes)
    )
    right, looked = [], []
    for (scene, _), answer in zip(scenes, answers, strict=True):
        (result,) = answer.results
        height, width = scene.pixels.shape[:2]
        assert result.size == (width, height)
        ((_, index, _),) = result.predictions
        right.append(index == scene.label)
        last = result.layers[-1]
        centre = np.array(scene.centre_xy)
        moved = np.linalg.norm(last.sampling_locations - centre, axis=-1)
        reference = np.linalg.norm(last.reference_points - centre, axis=-1)
        looked.append((moved < reference).mean() > 0.5)
    assert np.mean(right) >= 0.95
    assert np.mean(looked) >= 0.95
