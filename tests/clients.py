"""The same questions over both transports, with answers in one form."""

import asyncio
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import numpy as np
from PIL import Image

from service.pb import dat_pb2, dat_pb2_grpc
from tests import recipe
from tests.server import RunningServer


def encoded(format_: str = "JPEG", index: int = 0, size: tuple[int, int] = (240, 320)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(recipe.image(7, index, *size)).save(file, format_)
    return file.getvalue()


JPEG = encoded()
EXPLAIN = {"none": dat_pb2.EXPLAIN_NONE, "points": dat_pb2.EXPLAIN_POINTS}


@dataclass(frozen=True)
class Layer:
    """Sampling locations `(G, Hk, Wk, 2)` and reference points `(Hk, Wk, 2)`, pixels (x, y)."""

    stage: int
    block: int
    sampling_locations: np.ndarray
    reference_points: np.ndarray


@dataclass(frozen=True)
class Result:
    """What a client sees of one image; `error` is the code of its failure."""

    error: str | None = None
    predictions: tuple[tuple[str, int, float], ...] = ()
    size: tuple[int, int] = (0, 0)
    layers: tuple[Layer, ...] | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Answer:
    """What a client sees of one request; `error` is the code of a failure of the whole."""

    error: str | None = None
    status: int | str = 200
    results: tuple[Result, ...] = ()
    model: str = ""
    version: str = ""
    message: str = ""
    request_id: str = ""


async def over_http(server: RunningServer, images: Sequence[bytes], **options: Any) -> Answer:
    """One image as the body, several as multipart."""
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        if len(images) == 1:
            sent: dict[str, Any] = {
                "content": images[0],
                "headers": {"content-type": "application/octet-stream"},
            }
        else:
            # httpx sends no multipart without a file, so the empty request is JSON.
            files = [("file", (f"{n}.jpg", image)) for n, image in enumerate(images)]
            sent = {"files": files} if files else {"json": {"images": []}}
        return read_http(await client.post("/v1/classify", params=options, **sent))


async def over_json(server: RunningServer, images: Sequence[bytes], **options: Any) -> Answer:
    encoded = [base64.b64encode(image).decode() for image in images]
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        body = {"images": encoded, **options}
        return read_http(await client.post("/v1/classify", json=body))


async def over_grpc(server: RunningServer, images: Sequence[bytes], **options: Any) -> Answer:
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        try:
            response = await stub.Classify(
                message(images, **options), timeout=options.get("timeout")
            )
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata())
            code = trailing.get("dat-error-code", error.code().name.lower())
            request_id = trailing.get("x-request-id", "")
            return Answer(code, error.code().name, (), "", "", error.details() or "", request_id)
        return read_grpc(response)


async def over_stream(server: RunningServer, images: Sequence[bytes], **options: Any) -> Answer:
    request = dat_pb2.ClassifyStreamRequest(id="only", request=message(images, **options))
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        try:
            answers = [
                a async for a in stub.ClassifyStream([request], timeout=options.get("timeout"))
            ]
        except grpc.aio.AioRpcError as error:
            return Answer(error.code().name.lower(), error.code().name)
    (answer,) = answers
    assert answer.id == "only"
    if answer.HasField("error"):
        return Answer(answer.error.code, answer.error.grpc_code, message=answer.error.message)
    return read_grpc(answer.response)


def channel(server: RunningServer) -> grpc.aio.Channel:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(server.grpc_target, unlimited)


def own_channel(target: str) -> grpc.aio.Channel:
    """A channel with a connection of its own, which may come to any process of a server."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return grpc.aio.insecure_channel(target, options)


def message(images: Sequence[bytes], **options: Any) -> dat_pb2.ClassifyRequest:
    return dat_pb2.ClassifyRequest(
        images=images,
        model=options.get("model"),
        top_k=options.get("top_k"),
        explain=EXPLAIN[options.get("explain", "none")],
    )


def read_http(response: httpx.Response) -> Answer:
    body = response.json()
    request_id = response.headers["x-request-id"]
    if "error" in body:
        error = body["error"]
        assert error["request_id"] == request_id
        return Answer(error["code"], response.status_code, (), "", "", error["message"], request_id)
    return Answer(
        None,
        response.status_code,
        tuple(map(_http_result, body["results"])),
        body["model"],
        body["version"],
        request_id=request_id,
    )


def _http_result(result: dict[str, Any]) -> Result:
    if result["status"] == "error":
        return Result(result["error"]["code"])
    layers = result.get("points")
    return Result(
        None,
        tuple((p["label"], p["index"], p["score"]) for p in result["predictions"]),
        (result["image"]["width"], result["image"]["height"]),
        None
        if layers is None
        else tuple(
            Layer(
                layer["stage"],
                layer["block"],
                np.array(layer["sampling_locations"]),
                np.array(layer["reference_points"]),
            )
            for layer in layers
        ),
        result["timing"]["batch_size"],
    )


def read_grpc(response: dat_pb2.ClassifyResponse) -> Answer:
    results = tuple(map(_grpc_result, response.results))
    return Answer(None, "OK", results, response.model, response.version)


def _grpc_result(result: dat_pb2.ImageResult) -> Result:
    if result.HasField("error"):
        return Result(result.error.code)
    given = result.classification
    return Result(
        None,
        tuple((p.label, p.index, p.score) for p in given.predictions),
        (given.width, given.height),
        tuple(map(_grpc_layer, given.points.layers)) if given.HasField("points") else None,
        given.timing.batch_size,
    )


def _grpc_layer(layer: dat_pb2.DeformableLayer) -> Layer:
    shape = (layer.rows, layer.columns, 2)
    return Layer(
        layer.stage,
        layer.block,
        np.array(layer.sampling_locations).reshape(layer.groups, *shape),
        np.array(layer.reference_points).reshape(shape),
    )


TRANSPORTS = [over_http, over_json, over_grpc, over_stream]


async def eventually(condition: Any, timeout_s: float = 30) -> None:
    """Wait for something that the server does; asked again and again, as a scraper would."""
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)
