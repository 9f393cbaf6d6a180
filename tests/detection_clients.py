"""The same questions about objects over both transports, with answers in one form."""

import base64
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import numpy as np

from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import channel
from tests.server import RunningServer


@dataclass(frozen=True)
class Found:
    """One detection as a client sees it."""

    label: str
    index: int
    score: float
    box: list[float]
    mask: Any
    inside: Any


@dataclass(frozen=True)
class Seen:
    """One image as a client sees it; `error` is the code of its failure."""

    error: str | None = None
    found: tuple[Found, ...] = ()
    size: tuple[int, int] = (0, 0)
    input_size: tuple[int, int] = (0, 0)
    resize_mode: str = ""
    layers: list[Any] | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Answer:
    """One request as a client sees it."""

    error: str | None = None
    images: tuple[Seen, ...] = ()
    message: str = ""
    model: str = ""


async def over_http(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        if len(images) == 1:
            if "classes" in options:
                options["classes"] = ",".join(options["classes"])
            sent: dict[str, Any] = {"content": images[0], "params": options}
        else:
            files = [("file", (f"{n}.jpg", image)) for n, image in enumerate(images)]
            sent = {"files": files, "params": options}
        return _from_json(await client.post("/v1/detect", **sent))


async def over_json(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    body = {"images": [base64.b64encode(image).decode() for image in images], **options}
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        return _from_json(await client.post("/v1/detect", json=body))


def _from_json(response: httpx.Response) -> Answer:
    body = response.json()
    if "error" in body:
        return Answer(body["error"]["code"], message=body["error"]["message"])
    return Answer(None, tuple(map(_image_from_json, body["results"])), "", body["model"])


def _image_from_json(result: dict[str, Any]) -> Seen:
    if result["status"] == "error":
        return Seen(result["error"]["code"])
    found = tuple(
        Found(
            one["label"],
            one["index"],
            one["score"],
            one["box"],
            one.get("mask"),
            one.get("points_inside"),
        )
        for one in result["detections"]
    )
    image, seen = result["image"], result["input"]
    return Seen(
        None,
        found,
        (image["width"], image["height"]),
        (seen["width"], seen["height"]),
        result["resize_mode"],
        result.get("points"),
        result["timing"]["batch_size"],
    )


def _message(images: list[bytes], **options: Any) -> dat_pb2.DetectRequest:
    enums = {
        "explain": lambda name: dat_pb2.Explain.Value(f"EXPLAIN_{name.upper()}"),
        "masks": lambda name: dat_pb2.MaskFormat.Value(f"MASK_FORMAT_{name.upper()}"),
        "resize_mode": lambda name: dat_pb2.ResizeMode.Value(f"RESIZE_MODE_{name.upper()}"),
    }
    fields = {name: enums.get(name, lambda v: v)(value) for name, value in options.items()}
    return dat_pb2.DetectRequest(images=images, **fields)


async def over_grpc(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.DetectorServiceStub(open_channel)
        try:
            return _from_grpc(await stub.Detect(_message(images, **options)))
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata())
            return Answer(trailing["dat-error-code"], message=error.details() or "")


async def over_stream(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    request = dat_pb2.DetectStreamRequest(id="only", request=_message(images, **options))
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.DetectorServiceStub(open_channel)
        (answer,) = [answer async for answer in stub.DetectStream([request])]
    assert answer.id == "only"
    if answer.HasField("error"):
        return Answer(answer.error.code, message=answer.error.message)
    return _from_grpc(answer.response)


def _from_grpc(response: dat_pb2.DetectResponse) -> Answer:
    return Answer(None, tuple(map(_image_from_grpc, response.results)), "", response.model)


def _image_from_grpc(result: dat_pb2.DetectResult) -> Seen:
    if result.HasField("error"):
        return Seen(result.error.code)
    image = result.image
    found = tuple(
        Found(
            one.label,
            one.index,
            one.score,
            [one.box.x1, one.box.y1, one.box.x2, one.box.y2],
            _mask_from_grpc(one),
            [
                {"stage": part.stage, "block": part.block, "indices": list(part.indices)}
                for part in one.points_inside
            ]
            or None,
        )
        for one in image.detections
    )
    layers = None
    if image.HasField("points"):
        layers = [
            {
                "stage": layer.stage,
                "block": layer.block,
                "sampling_locations": np.array(layer.sampling_locations).reshape(
                    layer.groups, layer.rows, layer.columns, 2
                ),
            }
            for layer in image.points.layers
        ]
    return Seen(
        None,
        found,
        (image.width, image.height),
        (image.input_width, image.input_height),
        dat_pb2.ResizeMode.Name(image.resize_mode).removeprefix("RESIZE_MODE_").lower(),
        layers,
        image.timing.batch_size,
    )


def _mask_from_grpc(one: dat_pb2.Detection) -> Any:
    match one.WhichOneof("mask"):
        case "rle":
            return {"rle": {"size": [one.rle.height, one.rle.width], "counts": one.rle.counts}}
        case "polygon":
            rings = [np.array(ring.points).reshape(-1, 2).tolist() for ring in one.polygon.rings]
            return {"polygon": rings}
        case "png":
            text = base64.b64encode(one.png.png).decode()
            return {"png": {"png": text, "left": one.png.left, "top": one.png.top}}
    return None


CLIENTS = [over_http, over_json, over_grpc, over_stream]
