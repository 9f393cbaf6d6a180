"""The same questions about segments over both transports, with answers in one form."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import channel
from tests.server import RunningServer


@dataclass(frozen=True)
class Segment:
    """One class as a client sees it."""

    label: str
    index: int
    colour: list[int]
    share: float
    box: list[float]
    probability: float | None
    mask: Any


@dataclass(frozen=True)
class Attended:
    """What one query of a layer attends to, over all groups."""

    stage: int
    block: int
    cell: tuple[int, int]
    centre: list[float]
    keys: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Seen:
    """One image as a client sees it; `error` is the code of its failure."""

    error: str | None = None
    message: str = ""
    segments: tuple[Segment, ...] = ()
    label_map: bytes = b""
    confidence: bytes = b""
    size: tuple[int, int] = (0, 0)
    input_size: tuple[int, int] = (0, 0)
    points: list[NDArray[np.float64]] | None = None
    attention: list[Attended] | None = None
    batch_size: int = 0

    @property
    def labels(self) -> NDArray[np.uint8]:
        return pixels(self.label_map)


@dataclass(frozen=True)
class Answer:
    """One request as a client sees it."""

    error: str | None = None
    images: tuple[Seen, ...] = ()
    message: str = ""
    model: str = ""


def pixels(png: bytes) -> NDArray[np.uint8]:
    """The bytes of a PNG as they are stored: of an indexed one, the indices."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


async def over_http(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    if "classes" in options:
        options["classes"] = ",".join(options["classes"])
    if "queries" in options and options["queries"] != "auto":
        options["queries"] = ";".join(f"{x},{y}" for x, y in options["queries"])
    if len(images) == 1:
        sent: dict[str, Any] = {"content": images[0], "params": options}
    else:
        files = [("file", (f"{n}.jpg", image)) for n, image in enumerate(images)]
        sent = {"files": files, "params": options}
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        return _from_json(await client.post("/v1/segment", **sent))


async def over_json(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    body = {"images": [base64.b64encode(image).decode() for image in images], **options}
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        return _from_json(await client.post("/v1/segment", json=body))


def _from_json(response: httpx.Response) -> Answer:
    body = response.json()
    if "error" in body:
        return Answer(body["error"]["code"], message=body["error"]["message"])
    return Answer(None, tuple(map(_image_from_json, body["results"])), "", body["model"])


def _image_from_json(result: dict[str, Any]) -> Seen:
    if result["status"] == "error":
        return Seen(result["error"]["code"], result["error"]["message"])
    segments = tuple(
        Segment(**{"probability": None, "mask": None, **one}) for one in result["segments"]
    )
    image, seen = result["image"], result["input"]
    points, attention = result.get("points"), result.get("attention")
    return Seen(
        None,
        "",
        segments,
        base64.b64decode(result.get("label_map", "")),
        base64.b64decode(result.get("confidence", "")),
        (image["width"], image["height"]),
        (seen["width"], seen["height"]),
        None if points is None else [np.array(layer["sampling_locations"]) for layer in points],
        None
        if attention is None
        else [
            Attended(
                layer["stage"],
                layer["block"],
                (query["row"], query["column"]),
                query["centre"],
                [key["key"] for key in query["keys"]],
                [key["weight"] for key in query["keys"]],
            )
            for layer in attention
            for query in layer["queries"]
        ],
        result["timing"]["batch_size"],
    )


def _message(images: list[bytes], **options: Any) -> dat_pb2.SegmentRequest:
    enums = {
        "explain": lambda name: dat_pb2.Explain.Value(f"EXPLAIN_{name.upper()}"),
        "format": lambda name: dat_pb2.SegmentFormat.Value(f"SEGMENT_FORMAT_{name.upper()}"),
        "test_time": lambda name: dat_pb2.TestTime.Value(f"TEST_TIME_{name.upper()}"),
    }
    queries = options.pop("queries", ())
    asked = dat_pb2.AttentionOptions(
        queries=() if queries == "auto" else [dat_pb2.Position(x=x, y=y) for x, y in queries],
        auto=queries == "auto",
        top_n=options.pop("top_n", None),
    )
    fields = {name: enums.get(name, lambda v: v)(value) for name, value in options.items()}
    return dat_pb2.SegmentRequest(images=images, attention=asked, **fields)


async def over_grpc(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.SegmenterServiceStub(open_channel)
        try:
            return _from_grpc(await stub.Segment(_message(images, **options)))
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata())
            return Answer(trailing["dat-error-code"], message=error.details() or "")


async def over_stream(server: RunningServer, images: list[bytes], **options: Any) -> Answer:
    request = dat_pb2.SegmentStreamRequest(id="only", request=_message(images, **options))
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.SegmenterServiceStub(open_channel)
        (answer,) = [answer async for answer in stub.SegmentStream([request])]
    assert answer.id == "only"
    if answer.HasField("error"):
        return Answer(answer.error.code, message=answer.error.message)
    return _from_grpc(answer.response)


def _from_grpc(response: dat_pb2.SegmentResponse) -> Answer:
    return Answer(None, tuple(map(_image_from_grpc, response.results)), "", response.model)


def _image_from_grpc(result: dat_pb2.SegmentResult) -> Seen:
    if result.HasField("error"):
        return Seen(result.error.code, result.error.message)
    image = result.image
    points = [
        np.array(layer.sampling_locations).reshape(layer.groups, layer.rows, layer.columns, 2)
        for layer in image.points.layers
    ]
    return Seen(
        None,
        "",
        tuple(map(_segment, image.segments)),
        image.label_map,
        image.confidence,
        (image.width, image.height),
        (image.input_width, image.input_height),
        points if image.HasField("points") else None,
        [*_attended(image.attention)] if image.HasField("attention") else None,
        image.timing.batch_size,
    )


def _segment(one: dat_pb2.Segment) -> Segment:
    mask: Any = None
    match one.WhichOneof("mask"):
        case "rle":
            mask = {"rle": {"size": [one.rle.height, one.rle.width], "counts": one.rle.counts}}
        case "polygon":
            rings = [np.array(ring.points).reshape(-1, 2).tolist() for ring in one.polygon.rings]
            mask = {"polygon": rings}
    return Segment(
        one.label,
        one.index,
        [one.colour.red, one.colour.green, one.colour.blue],
        one.share,
        [one.box.x1, one.box.y1, one.box.x2, one.box.y2],
        one.probability if one.HasField("probability") else None,
        mask,
    )


def _attended(attention: dat_pb2.Attention) -> Iterator[Attended]:
    for layer in attention.layers:
        for query in layer.queries:
            yield Attended(
                layer.stage,
                layer.block,
                (query.row, query.column),
                [query.centre.x, query.centre.y],
                [*query.keys],
                [*query.weights],
            )


CLIENTS = [over_http, over_json, over_grpc, over_stream]
