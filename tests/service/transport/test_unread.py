"""Answers that clients ask for and do not take: they are in memory until then."""

import asyncio
import io
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import httpx
import pytest
from PIL import Image

from service.pb import inference_pb2
from tests.clients import eventually, own_channel
from tests.server import RunningServer, start_server

MIB = 2**20
NAME = "semantic_fpn_dat_nano"
WIDTH, HEIGHT = 4000, 3000
ANSWER_BYTES = 2 * WIDTH * HEIGHT
CUT = "dat_connections_cut_total,port=http,reason=unread"
SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server in which one answer has room, and two have not."""
    with start_server(
        DAT_MODEL__NAME=NAME,
        DAT_LIMITS__MAX_BODY_BYTES=16 * MIB,
        DAT_LIMITS__MAX_IMAGE_BYTES=16 * MIB,
        DAT_LIMITS__MAX_BYTES_IN_FLIGHT=32 * MIB,
    ) as running:
        yield running


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("L", (WIDTH, HEIGHT), 128).save(file, "PNG")
    return file.getvalue()


PICTURE = picture()


def http_request() -> tuple[dict[str, str], bytes]:
    tensor = struct.pack("<I", len(PICTURE)) + PICTURE
    binary = {"binary_data_size": len(tensor)}
    image = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": binary}
    outputs = [{"name": "label_map", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [image], "outputs": outputs}).encode()
    return {"Inference-Header-Content-Length": str(len(head))}, head + tensor


def grpc_request() -> bytes:
    kind = inference_pb2.ModelInferRequest
    image = kind.InferInputTensor(name="image", datatype="BYTES", shape=[1, 1])
    return kind(
        model_name=NAME,
        inputs=[image],
        outputs=[kind.InferRequestedOutputTensor(name="label_map")],
        raw_input_contents=[struct.pack("<I", len(PICTURE)) + PICTURE],
    ).SerializeToString()


def ask_and_take_nothing(server: RunningServer) -> socket.socket:
    host, port = server.http_url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    headers, body = http_request()
    lines = [f"POST /v2/models/{NAME}/infer HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection


async def test_over_http_the_connection_with_the_most_is_cut(server):
    with ExitStack() as stack:
        for cut in range(3):  # of equals the one that began to wait first
            stack.enter_context(ask_and_take_nothing(server))
            await eventually(lambda n=cut: server.metrics()[CUT] == n)
    headers, body = http_request()
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        for _ in range(3):  # what is taken does not count
            answer = await client.post(f"/v2/models/{NAME}/infer", content=body, headers=headers)
            assert answer.status_code == 200
            assert len(answer.content) > ANSWER_BYTES
    assert server.metrics()[CUT] == 2


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
async def test_over_grpc_the_connection_with_the_most_is_cut(server, method):
    async with own_channel(server.grpc_target) as channel, asyncio.timeout(60):
        calls = [channel.stream_stream(f"{SERVICE}/{method}")() for _ in range(2)]
        for call in calls:
            await call.write(grpc_request())
        assert {await call.code() for call in calls} == {grpc.StatusCode.UNAVAILABLE}
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(server.grpc_target, options) as channel:
        for _ in range(3):
            call = channel.stream_stream(f"{SERVICE}/{method}")([grpc_request()])
            (answer,) = [message async for message in call]
            assert len(answer) > ANSWER_BYTES
