"""Segments as tensors: those of our own interface, in one process."""

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model.segmentation.config import SEGMENTERS
from tests.clients import encoded
from tests.model.segmentation.conftest import segmenter_state
from tests.segmentation_clients import over_http
from tests.server import RunningServer, start_server
from tests.service.transport.oip.asking import (
    Answer,
    files,
    message,
    over_rest,
    over_rpc,
    parameters,
    pixels,
)

NAME = "semantic_fpn_dat_nano"
PATH = f"/v2/models/{NAME}/infer"
PNG = [encoded("PNG", index, (120, 90)) for index in range(2)]
CLASSES = SEGMENTERS[NAME].num_classes


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("segmenter")
    meta = {"CLASSES": [f"kind {index}" for index in range(CLASSES)]}
    state = segmenter_state(SEGMENTERS[NAME])
    torch.save({"meta": meta, "state_dict": state}, folder / f"{NAME}.pth")
    with start_server(
        DAT_MODEL__CHECKPOINT=folder / f"{NAME}.pth", DAT_BATCHING__MAX_BATCH=len(PNG)
    ) as running:
        yield running


def every_way(server: RunningServer, sent, **asked) -> list[Answer]:
    return [
        over_rest(server, [sent], path=PATH, parameters=asked),
        over_rpc(server, message([sent], NAME, parameters=parameters(**asked))),
    ]


async def test_label_maps_and_shares_are_those_of_our_own_interface(server):
    ours = await over_http(server, PNG, confidence=True)
    labels = np.stack([image.labels for image in ours.images])
    margins = np.stack([np.asarray(Image.open(io.BytesIO(one.confidence))) for one in ours.images])
    shares = np.zeros((len(PNG), CLASSES))
    for row, image in zip(shares, ours.images, strict=True):
        row[[one.index for one in image.segments]] = [one.share for one in image.segments]
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in PNG])
    for sent in (files(PNG), pixels(decoded)):
        for answer in every_way(server, sent):
            assert answer.error is None
            np.testing.assert_array_equal(answer.outputs["label_map"], labels)
            np.testing.assert_array_equal(answer.outputs["confidence"], margins)
            np.testing.assert_allclose(answer.outputs["shares"], shares, atol=1e-6)


async def test_classes_that_are_left_out_have_the_index_behind_the_last(server):
    (image,) = (await over_http(server, PNG[:1])).images
    first = image.segments[0]
    for answer in every_way(server, files(PNG[:1]), classes=first.label):
        assert answer.error is None
        expected = np.where(image.labels == first.index, first.index, CLASSES)
        np.testing.assert_array_equal(answer.outputs["label_map"][0], expected)
        assert np.flatnonzero(answer.outputs["shares"][0]).tolist() == [first.index]


def test_the_largest_classes_are_ranked(server):
    asked = [{"name": "shares", "parameters": {"classification": 2}}]
    answer = over_rest(server, [files(PNG)], path=PATH, outputs=asked)
    assert answer.outputs["shares"].shape == (2, 2)
    assert answer.outputs["shares"][0, 0].count(b":") == 2


def test_images_of_several_sizes_have_no_one_label_map(server):
    several = files([PNG[0], encoded("PNG", 0, (64, 64))])
    for answer in every_way(server, several):
        assert answer.status in (400, "INVALID_ARGUMENT")
        assert answer.error is not None
        assert "different sizes" in answer.error
    only_shares = over_rest(server, [several], path=PATH, outputs=[{"name": "shares"}])
    assert only_shares.outputs["shares"].shape == (2, CLASSES)


@pytest.mark.parametrize("asked", [{"test_time": "often"}, {"classes": "no such"}])
def test_a_bad_parameter_is_told(server, asked):
    for answer in every_way(server, files(PNG[:1]), **asked):
        assert answer.status in (400, "INVALID_ARGUMENT")


def test_the_metadata_name_the_tensors(server):
    body = httpx.get(f"{server.http_url}/v2/models/{NAME}").json()
    shapes = {one["name"]: (one["datatype"], one["shape"]) for one in body["outputs"]}
    assert shapes["label_map"] == ("UINT16", [-1, -1, -1])
    assert shapes["shares"] == ("FP32", [-1, CLASSES])
    assert {one["name"] for one in body["inputs"]} == {"image", "pixels", "normalised"}
