"""A made-up task is served by its own files and one entry in the list of tasks."""

import asyncio
import base64
import io

import grpc
import httpx
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from PIL import Image

from model.checkpoint import write
from tests.mean_colour.messages import message
from tests.mean_colour.task import VARIANT
from tests.server import ROOT, RunningServer, start_server

GAIN = [1.0, 0.5, 0.25]
MODELS = """
[[models]]
name = "mean"
checkpoint = "mean.safetensors"
[[models]]
name = "dat_nano"
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mean")
    write(folder / "mean.safetensors", {"gain": torch.tensor(GAIN)}, {"variant": VARIANT})
    (folder / "models.toml").write_text(MODELS)
    with start_server(["tests.mean_colour"], DAT_MODEL__FILE=folder / "models.toml") as running:
        yield running


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


IMAGES = [plain((200, 100, 40)), b"no image", plain((0, 255, 8), (9, 5))]
COLOURS = [[200, 50, 10], None, [0, 127.5, 2]]


def test_it_is_served_over_http(server: RunningServer):
    files = [("file", image) for image in IMAGES]
    answer = httpx.post(f"{server.http_url}/v1/mean-colour", files=files).json()
    assert answer["model"] == "mean"
    assert [result.get("colour") for result in answer["results"]] == COLOURS
    good, bad, small = answer["results"]
    assert (bad["status"], bad["error"]["code"]) == ("error", "invalid_image")
    assert good["timing"]["batch_size"] >= 1
    assert small["image"] == {"width": 9, "height": 5}
    url = f"{server.http_url}/v1/mean-colour?inverted=true"
    (inverted,) = httpx.post(url, content=IMAGES[0]).json()["results"]
    assert inverted["colour"] == [55, 205, 245]
    refused = httpx.post(f"{url}&explain=points", content=IMAGES[0])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_option")


def test_it_is_served_as_tensors(server: RunningServer):
    image = {"name": "image", "datatype": "BYTES", "shape": [2]}
    data = [base64.b64encode(IMAGES[index]).decode() for index in (0, 2)]
    asked = {"inputs": [image | {"data": data}], "parameters": {"inverted": True}}
    answer = httpx.post(f"{server.http_url}/v2/models/mean/infer", json=asked).json()
    assert answer["outputs"] == [
        {
            "name": "colour",
            "datatype": "FP32",
            "shape": [2, 3],
            "data": [55, 205, 245, 255, 127.5, 253],
        }
    ]
    metadata = httpx.get(f"{server.http_url}/v2/models/mean").json()
    assert metadata["outputs"] == [{"name": "colour", "datatype": "FP32", "shape": [-1, 3]}]
    explained = asked | {"outputs": [{"name": "points.0.0"}]}
    refused = httpx.post(f"{server.http_url}/v2/models/mean/infer", json=explained)
    assert refused.status_code == 400
    assert "no output 'points.0.0'; expected some of colour" in refused.json()["error"]


def test_it_is_in_the_document_and_among_the_models_and_the_metrics(server: RunningServer):
    document = httpx.get(f"{server.http_url}/openapi.json").json()
    assert "/v1/mean-colour" in document["paths"]
    models = httpx.get(f"{server.http_url}/v1/models").json()["models"]
    assert {model["name"]: model["task"] for model in models} == {
        "mean": "mean-colour",
        "dat_nano": "classify",
    }
    assert all(model["default"] for model in models)
    assert httpx.post(f"{server.http_url}/v1/mean-colour", content=IMAGES[0]).status_code == 200
    assert any("task=mean-colour" in name for name in server.metrics())


async def test_it_is_served_over_grpc(server: RunningServer):
    async with grpc.aio.insecure_channel(server.grpc_target) as channel:
        service = "/mean.v1.MeanColourService/MeanColour"
        kinds = (message("Request").SerializeToString, message("Response").FromString)
        answer = await channel.unary_unary(service, *kinds)(message("Request")(images=IMAGES))
        found = [
            [result.colour.red, result.colour.green, result.colour.blue]
            if result.HasField("colour")
            else None
            for result in answer.results
        ]
        assert found == COLOURS
        assert answer.results[1].error.code == "invalid_image"

        stream = channel.stream_stream(
            f"{service}Stream",
            message("StreamRequest").SerializeToString,
            message("StreamResponse").FromString,
        )
        asked = [
            message("StreamRequest")(id=str(n), request=message("Request")(images=[image]))
            for n, image in enumerate(IMAGES)
        ]
        answers = {one.id: one async for one in stream(iter(asked))}
        assert answers["2"].response.results[0].colour.green == 127.5
        assert answers["1"].error.code == "invalid_image"

        health = health_pb2_grpc.HealthStub(channel)
        asked_of = health_pb2.HealthCheckRequest(service="mean.v1.MeanColourService")
        assert (await health.Check(asked_of)).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_shows_it(server: RunningServer):
    def services() -> list[str]:
        with grpc.insecure_channel(server.grpc_target) as channel:
            return list(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert "mean.v1.MeanColourService" in await asyncio.to_thread(services)


def test_the_other_tasks_are_as_they_were(server: RunningServer):
    answer = httpx.post(f"{server.http_url}/v1/classify", content=IMAGES[0]).json()
    assert answer["model"] == "dat_nano"
    assert httpx.post(f"{server.http_url}/v1/detect", content=IMAGES[0]).status_code == 404


def test_nothing_else_knows_of_it():
    for room in ("service", "model", "proto"):
        for path in (ROOT / room).rglob("*"):
            if path.suffix in (".py", ".proto"):
                assert "mean_colour" not in path.read_text(), path
