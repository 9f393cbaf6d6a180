"""What strangers and crowds do on the gRPC port, and what it costs the others."""

import asyncio
import gzip
import io
import operator
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from bench.memory import peak, reset_peak, resident
from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import JPEG, channel, eventually, message, over_grpc, own_channel
from tests.server import RunningServer, start_server

MIB = 2**20
BODY_MIB = 8
BUDGET_MIB = 32
PING_INTERVAL_S = 0.2
AGE_S = 2
CLASSIFY = "/dat.v1.ClassifierService/Classify"


@pytest.fixture(scope="module")
def small_server() -> Iterator[RunningServer]:
    """A server that receives two messages at a time."""
    with start_server(
        DAT_LIMITS__MAX_IMAGE_BYTES=BODY_MIB * MIB,
        DAT_LIMITS__MAX_BODY_BYTES=BODY_MIB * MIB,
        DAT_LIMITS__MAX_BYTES_IN_FLIGHT=BUDGET_MIB * MIB,
        DAT_LIMITS__MAX_STREAMS=2,
        DAT_SERVER__GRPC_MIN_PING_INTERVAL_S=PING_INTERVAL_S,
        DAT_BATCHING__MAX_BATCH=1,
    ) as running:
        yield running


@pytest.fixture
async def golden(small_server: RunningServer) -> AsyncIterator[None]:
    """Whatever a test does, the same question has the same answer afterwards, soon."""
    before = await over_grpc(small_server, [JPEG])
    yield
    async with asyncio.timeout(20):
        after = await over_grpc(small_server, [JPEG])
    assert after.error is None
    assert after.results[0].predictions == before.results[0].predictions
    gauges = ("dat_requests_in_flight", "dat_request_bytes_in_flight", "dat_requests_waiting")
    await eventually(
        lambda: not any(v for n, v in small_server.metrics().items() if n.startswith(gauges))
    )


async def silence() -> AsyncIterator[Any]:
    """The messages of a client that sends none."""
    await asyncio.sleep(3600)
    yield b""


@pytest.mark.usefixtures("golden")
async def test_refused_requests_leave_nothing_behind(small_server):
    """With 7 MB each; none of them is ever a batch."""
    padding = b"\xff" * (7 * MIB)
    kinds: list[tuple[str, bytes]] = [
        (code, request.SerializeToString())
        for code, request in {
            "unknown_model": dat_pb2.ClassifyRequest(images=[padding], model="none"),
            "invalid_option": dat_pb2.ClassifyRequest(images=[padding], top_k=0),
            "too_many_images": dat_pb2.ClassifyRequest(images=[padding, *[b""] * 40]),
            "invalid_image": dat_pb2.ClassifyRequest(images=[padding]),
        }.items()
    ]
    kinds += [
        ("invalid_request", kinds[0][1] + b"\xff"),
        ("image_too_large", kinds[0][1] + b"\x0a" + b"\x80\x80\x80\x01" + bytes(2 * MIB)),
        ("deadline_exceeded", message([JPEG]).SerializeToString()),
    ]

    async def refuse() -> None:
        async with channel(small_server) as open_channel:
            call: Any = open_channel.unary_unary(CLASSIFY)
            for code, sent in kinds:
                timeout = 1e-3 if code == "deadline_exceeded" else 60
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await call(sent, timeout=timeout)
                told = dict(failure.value.trailing_metadata() or ())
                assert told.get("dat-error-code", "deadline_exceeded") == code

    pid = small_server.process.pid
    await refuse()
    before = resident(pid)
    for _ in range(8):
        await refuse()
    await eventually(lambda: resident(pid) - before < 40 * MIB)


@pytest.mark.usefixtures("golden")
async def test_bytes_of_many_uploads_are_bounded(small_server):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    picture = file.getvalue()
    assert 6 * MIB < len(picture) < BODY_MIB * MIB
    pid = small_server.process.pid
    before = resident(pid)
    reset_peak(pid)
    async with asyncio.timeout(120):
        answers = await asyncio.gather(*(over_grpc(small_server, [picture]) for _ in range(40)))
    # Where the server keeps up, each has its turn.
    assert {None} <= {answer.error for answer in answers} <= {None, "overloaded"}
    # Two that are being received, copied twice by gRPC; the budget; and what is being decoded.
    assert peak(pid) - before < (6 * BODY_MIB + BUDGET_MIB + 80) * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("golden")
async def test_callers_who_do_not_send_are_cut_off_when_others_wait(small_server):
    async with channel(small_server) as open_channel:
        calls = [open_channel.stream_unary(CLASSIFY)(silence(), timeout=60) for _ in range(6)]
        await asyncio.sleep(0.3)
        async with asyncio.timeout(30):
            assert (await over_grpc(small_server, [JPEG])).error is None
            health = health_pb2_grpc.HealthStub(open_channel)
            await health.Check(health_pb2.HealthCheckRequest())
            # Which of them came first, the server alone knows.
            done, _ = await asyncio.wait(
                [asyncio.ensure_future(call.code()) for call in calls],
                return_when=asyncio.FIRST_COMPLETED,
            )
        assert {code.result() for code in done} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        (cut, *_) = [call for call in calls if call.done()]
        trailing = dict(await cut.trailing_metadata())
        assert trailing["dat-error-code"] == "overloaded"
        assert "grpc-retry-pushback-ms" in trailing
        for call in calls:
            call.cancel()


@pytest.mark.usefixtures("golden")
@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", CLASSIFY])
async def test_one_connection_of_silent_callers_does_not_keep_others_out(small_server, method):
    """They are so many that to cut one after the other would take longer than anybody waits."""
    target = small_server.grpc_target
    # Python's gRPC keeps the streams of cancelled calls for a while, so nobody else has theirs.
    async with own_channel(target) as silent, own_channel(target) as other:
        calls = [silent.stream_unary(method)(silence(), timeout=60) for _ in range(120)]
        await asyncio.sleep(0.3)
        async with asyncio.timeout(20):
            health = health_pb2_grpc.HealthStub(other)
            await health.Check(health_pb2.HealthCheckRequest(), timeout=1)
            stub = dat_pb2_grpc.ClassifierServiceStub(other)
            assert (await stub.Classify(message([JPEG]))).results
        for call in calls:
            call.cancel()


@pytest.mark.usefixtures("golden")
async def test_open_streams_are_bounded(small_server):
    async with channel(small_server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        streams = [stub.ClassifyStream(silence()) for _ in range(2)]
        in_use = [asyncio.ensure_future(stream.read()) for stream in streams]
        await asyncio.sleep(0.3)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.ClassifyStream(iter(())).read()
        assert dict(failure.value.trailing_metadata())["dat-error-code"] == "overloaded"
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*in_use, return_exceptions=True)


@pytest.mark.usefixtures("golden")
async def test_a_message_that_grows_when_it_is_unpacked_is_refused(small_server):
    bomb = bytes(200 * MIB)
    assert len(gzip.compress(bomb)) < MIB
    pid = small_server.process.pid
    before = resident(pid)
    reset_peak(pid)
    async with channel(small_server) as open_channel:
        call: Any = open_channel.unary_unary(CLASSIFY)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call(bomb, compression=grpc.Compression.Gzip)
    assert failure.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert peak(pid) - before < 100 * MIB


@pytest.mark.slow
@pytest.mark.usefixtures("golden")
async def test_a_client_that_pings_often_keeps_its_stream(small_server):
    """It pings once a second; gRPC's own limit closes the connection at the third ping."""
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    asked = dat_pb2.ClassifyStreamRequest(id="late", request=message([JPEG]))
    async with grpc.aio.insecure_channel(small_server.grpc_target, options) as open_channel:
        stream = dat_pb2_grpc.ClassifierServiceStub(open_channel).ClassifyStream()
        await stream.write(asked)
        assert (await stream.read()).id == "late"
        await asyncio.sleep(3.5)
        await stream.write(asked)
        assert (await stream.read()).id == "late"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


# Frames of HTTP/2, for clients that no library would be.

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_HEADERS = 4
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A header that is not indexed."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


CALL = (
    field(b":method", b"POST")
    + field(b":scheme", b"http")
    + field(b":path", CLASSIFY.encode())
    + field(b":authority", b"x")
    + field(b"content-type", b"application/grpc")
    + field(b"te", b"trailers")
)


def connect(server: RunningServer) -> socket.socket:
    host, port = server.grpc_target.split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(GREETING + frame(SETTINGS, 0, 0))
    return connection


def incoming_kinds(connection: socket.socket) -> Iterator[int]:
    """Kinds of the frames that come, until the server closes."""
    with suppress(ConnectionError), connection.makefile("rb") as incoming:
        while len(head := incoming.read(9)) == 9:
            incoming.read(int.from_bytes(head[:3], "big"))
            yield head[3]


def flood(server: RunningServer, frames: list[bytes]) -> None:
    with connect(server) as connection:
        with suppress(ConnectionError):
            connection.sendall(b"".join(frames))
        list(islice(incoming_kinds(connection), 5))


@pytest.mark.usefixtures("golden")
async def test_floods_of_frames_end_their_connection_alone(small_server):
    pid = small_server.process.pid
    before = resident(pid)
    opened = [frame(HEADERS, END_HEADERS, 2 * n + 1, CALL) for n in range(1000)]
    resets = [frame(RESET, 0, 2 * n + 1, b"\0\0\0\x08") for n in range(1000)]
    floods = {
        "pings": [frame(PING, 0, 0, bytes(8))] * 20_000,
        "streams": opened,
        "rapid resets": [part for pair in zip(opened, resets, strict=True) for part in pair],
        "settings": [frame(SETTINGS, 0, 0)] * 20_000,
        "large headers": [frame(HEADERS, 0, 1, CALL)] + [frame(9, 0, 1, b"\0" * 16_000)] * 1000,
    }
    for name, frames in floods.items():
        async with asyncio.timeout(20):
            await asyncio.to_thread(flood, small_server, frames)
        assert (await over_grpc(small_server, [JPEG])).error is None, name
    await eventually(lambda: resident(pid) - before < 60 * MIB)


@pytest.mark.slow
async def test_an_old_connection_is_closed_when_its_calls_have_ended():
    asked = dat_pb2.ClassifyStreamRequest(id="old", request=message([JPEG]))
    with (
        start_server(
            DAT_MODEL__NAME="dat_nano",
            DAT_SERVER__GRPC_MAX_CONNECTION_AGE_S=AGE_S,
            DAT_SERVER__GRPC_CONNECTION_GRACE_S=120,
        ) as server,
        connect(server) as idle,
    ):
        async with channel(server) as open_channel:
            stream = dat_pb2_grpc.ClassifierServiceStub(open_channel).ClassifyStream()
            await stream.write(asked)
            assert (await stream.read()).id == "old"
            async with asyncio.timeout(60):  # gRPC is late with it at times
                assert await asyncio.to_thread(operator.contains, incoming_kinds(idle), GOAWAY)
            await stream.write(asked)
            assert (await stream.read()).id == "old"
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
