"""What a crowd is told by the head of a request alone, and what its images may have of pixels."""

import asyncio
import json
import socket
import struct
import zlib

import httpx
import pytest

from service.images.containers import declared_pixels, read_container
from service.pb import dat_pb2_grpc
from tests.clients import JPEG, channel, encoded, eventually, message


def ask(server, identity: str) -> list[tuple[int, dict[str, str], bytes]]:
    """Three requests on one connection: two with bodies for the model, and one for the health."""
    host, port = server.http_url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Request-Id: {identity}\r\n"
        f"Content-Type: image/jpeg\r\nContent-Length: {len(JPEG)}\r\n\r\n"
    )
    seen = []
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        incoming = connection.makefile("rb")
        for sent in (
            head.encode() + JPEG,
            head.encode() + JPEG,
            b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
        ):
            connection.sendall(sent)
            status = int(incoming.readline().split()[1])
            headers = {}
            while (line := incoming.readline()) != b"\r\n":
                name, value = line.decode().rstrip("\r\n").split(": ", 1)
                headers[name.lower()] = value
            seen.append((status, headers, incoming.read(int(headers["content-length"]))))
        incoming.close()
    return seen


def waiting(server):
    return server.metrics()["dat_requests_waiting,model=dat_nano"]


async def test_a_crowd_is_turned_away_by_the_head_and_its_connections_go_on(fresh_slow_server):
    identity, server = 'mine"\\', fresh_slow_server.server
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        with fresh_slow_server.fault("wait"):
            crowd = [stub.Classify(message([JPEG]))]
            # Of many at once some may be refused before the device takes the first ones.
            while (await asyncio.to_thread(waiting, server)) < 8:
                crowd.append(stub.Classify(message([JPEG])))
            *posts, (live, _, _) = await asyncio.to_thread(ask, server, identity)
        await asyncio.gather(*(call.code() for call in crowd))
    assert live == 200
    for status, headers, body in posts:
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert headers["x-request-id"] == identity
        assert headers["x-content-type-options"] == "nosniff"
        error = json.loads(body)["error"]
        assert (error["code"], error["request_id"]) == ("overloaded", identity)
    # Only the gate says this: the application was not asked.
    said = await asyncio.to_thread(server.wait_for_event, "requests turned away")
    assert said["code"] == "overloaded"


async def test_a_timeout_that_there_is_not_is_refused_as_such_in_a_crowd_too(fresh_slow_server):
    server = fresh_slow_server.server
    async with (
        channel(server) as open_channel,
        httpx.AsyncClient(base_url=server.http_url, timeout=60) as client,
    ):
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        with fresh_slow_server.fault("wait"):
            crowd = [stub.Classify(message([JPEG]))]
            while (await asyncio.to_thread(waiting, server)) < 4:
                crowd.append(stub.Classify(message([JPEG])))
            for timeout in ("-inf", "-1e308", "0", "nan"):
                answer = await client.post(f"/v1/classify?timeout={timeout}", content=JPEG)
                assert answer.status_code == 400
                assert "'timeout': Input should be" in answer.json()["error"]["message"]
        await asyncio.gather(*(call.code() for call in crowd))


async def test_a_client_that_leaves_with_several_requests_leaves_none_in_the_queue(
    fresh_slow_server,
):
    server = fresh_slow_server.server
    host, port = server.http_url.removeprefix("http://").split(":")
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(JPEG)}\r\n\r\n"
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        with fresh_slow_server.fault("wait"):
            # The device takes no image beyond these.
            before = [stub.Classify(message([JPEG])) for _ in range(3)]
            await eventually(lambda: busy(server) == 3)
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall((head.encode() + JPEG) * 2)
                await eventually(lambda: busy(server) == 4)
            await eventually(lambda: busy(server) == 3)
        await asyncio.gather(*(call.code() for call in before))


def busy(server):
    """How many images are waiting or on the device."""
    metrics = server.metrics()
    return waiting(server) + metrics["dat_requests_running,model=dat_nano"]


def png_head(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def test_the_pixels_of_a_request_are_bounded_together(server):
    files = [("file", (f"{n}.png", png_head(5000, 5000))) for n in range(5)]
    with httpx.Client(base_url=server.http_url, timeout=60) as client:
        answer = client.post("/v1/classify", files=files)
        assert answer.status_code == 413
        assert "125000000 pixels" in answer.json()["error"]["message"]
        # Fewer are each looked at, and fail for what they are.
        few = client.post("/v1/classify", files=files[:4])
    assert few.status_code == 200
    assert {result["error"]["code"] for result in few.json()["results"]} == {"invalid_image"}


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (240, 320), (33, 7)])
def test_an_image_declares_the_pixels_that_it_has(format_, size):
    data = encoded(format_, size=size)
    container = read_container(data)
    assert declared_pixels(data) == container.width * container.height == size[0] * size[1]
    assert declared_pixels(b"no image at all") == 0
    # Where the size would have to be searched for, nobody knows.
    assert declared_pixels(b"\xff\xd8" + b"\xff\xe1\x00\x02" * 300 + JPEG[2:]) is None
