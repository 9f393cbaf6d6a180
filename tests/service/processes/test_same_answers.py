"""A server of many processes answers as one of one process does, to the last bit."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from google.protobuf.json_format import MessageToDict

from model import checkpoint as checkpoints
from model.detection.detector import create_detector
from model.segmentation.config import SEGMENTERS
from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import EXPLAIN, channel, encoded
from tests.faults import SHAPES
from tests.mean_colour.messages import message as colour_message
from tests.mean_colour.task import VARIANT
from tests.model.segmentation.conftest import segmenter_state
from tests.server import RunningServer, start_server

MODELS = """
[[models]]
name = "dat_nano"
[[models]]
name = "masks"
checkpoint = "masks.safetensors"
[[models]]
name = "segments"
checkpoint = "segments.pth"
[[models]]
name = "mean"
checkpoint = "mean.safetensors"
"""
IMAGES = [encoded(index=n, size=(90 + 31 * n, 140)) for n in range(3)] + [
    encoded("PNG", index=4, size=(300, 210)),
    b"no image",
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RunningServer]]:
    """One of each shape, with a classifier, a detector, a segmenter, and a made-up task."""
    folder: Path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    detector = create_detector("mask_rcnn_dat_nano")
    facts = {
        "variant": "mask_rcnn_dat_nano",
        "labels": json.dumps([f"kind {n}" for n in range(12)]),
    }
    checkpoints.write(folder / "masks.safetensors", detector.state_dict(), facts)
    state = segmenter_state(SEGMENTERS["semantic_fpn_dat_nano"])
    meta = {"CLASSES": [f"kind {n}" for n in range(13)]}
    torch.save({"meta": meta, "state_dict": state}, folder / "segments.pth")
    gain = {"gain": torch.tensor([1.0, 0.5, 0.25])}
    checkpoints.write(folder / "mean.safetensors", gain, {"variant": VARIANT})
    (folder / "models.toml").write_text(MODELS)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                start_server(
                    ["tests.mean_colour"],
                    DAT_MODEL__FILE=folder / "models.toml",
                    # What shares a batch depends on chance, and the last bits on the batch.
                    DAT_BATCHING__MAX_BATCH=1,
                    DAT_ENGINE__THREADS=1,
                    DAT_LIMITS__DEFAULT_TIMEOUT_S=100,
                    **settings,
                )
            )
            for settings in SHAPES.values()
        ]


def without_times(answer: Any) -> Any:
    """An answer but for what differs each time."""
    if isinstance(answer, dict):
        times = ("timing", "request_id", "requestId")
        return {key: without_times(value) for key, value in answer.items() if key not in times}
    return [without_times(value) for value in answer] if isinstance(answer, list) else answer


def over_http(server: RunningServer, path: str, images: list[bytes], **options: str) -> Any:
    url = f"{server.http_url}/v1/{path}"
    if len(images) == 1:
        answer = httpx.post(url, content=images[0], params=options, timeout=100)
    else:
        files = [("file", image) for image in images]
        answer = httpx.post(url, files=files, params=options, timeout=100)
    return answer.status_code, without_times(answer.json())


@pytest.mark.parametrize("images", [IMAGES[:1], IMAGES], ids=["one image", "several images"])
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("classify", {}),
        ("classify", {"explain": "points", "top_k": "12"}),
        ("classify", {"model": "no such model"}),
        ("detect", {"explain": "points"}),
        pytest.param(
            "detect", {"masks": "polygon", "resize_mode": "letterbox"}, marks=pytest.mark.slow
        ),
        ("segment", {"explain": "points", "confidence": "true"}),
        pytest.param("segment", {"format": "polygon", "min_share": "0.05"}, marks=pytest.mark.slow),
        ("mean-colour", {"inverted": "true"}),
    ],
)
def test_answers_over_http_are_equal(servers, path, options, images):
    one, many = (over_http(server, path, images, **options) for server in servers)
    assert many == one
    assert one[0] < 500


def test_models_are_described_alike(servers):
    one, many = (httpx.get(f"{server.http_url}/v1/models").json() for server in servers)
    assert many == one


async def over_grpc(server: RunningServer, images: list[bytes]) -> list[Any]:
    explained = EXPLAIN["points"]
    async with channel(server) as connection:
        classifier = dat_pb2_grpc.ClassifierServiceStub(connection)
        detector = dat_pb2_grpc.DetectorServiceStub(connection)
        segmenter = dat_pb2_grpc.SegmenterServiceStub(connection)
        models = dat_pb2_grpc.ModelServiceStub(connection)
        colours = connection.unary_unary(
            "/mean.v1.MeanColourService/MeanColour",
            colour_message("Request").SerializeToString,
            colour_message("Response").FromString,
        )
        classify = dat_pb2.ClassifyRequest(images=images, explain=explained)
        streamed = [
            answer
            async for answer in classifier.ClassifyStream(
                [dat_pb2.ClassifyStreamRequest(id="a", request=classify)]
            )
        ]
        return [
            await classifier.Classify(classify),
            await detector.Detect(dat_pb2.DetectRequest(images=images, explain=explained)),
            await segmenter.Segment(dat_pb2.SegmentRequest(images=images, explain=explained)),
            await models.ListModels(dat_pb2.ListModelsRequest()),
            await colours(colour_message("Request")(images=images)),
            *streamed,
        ]


async def test_answers_over_grpc_are_equal(servers):
    one, many = [
        [without_times(MessageToDict(answer)) for answer in await over_grpc(server, IMAGES)]
        for server in servers
    ]
    assert many == one
