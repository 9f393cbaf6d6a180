"""Malformed messages, over every gRPC method: a refusal with a code, and nothing else happens."""

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.pb import dat_pb2
from service.transport.rpc.wire import Received
from tests.clients import JPEG, channel, message, over_grpc
from tests.server import RunningServer
from tests.service.transport.rpc.fuzz import BUGS, MALFORMED, fuzz

CLASSIFY = "/dat.v1.ClassifierService/Classify"
METHODS = [
    CLASSIFY,
    "/dat.v1.ClassifierService/ClassifyStream",
    "/dat.v1.DetectorService/Detect",
    "/dat.v1.DetectorService/DetectStream",
    "/dat.v1.SegmenterService/Segment",
    "/dat.v1.SegmenterService/SegmentStream",
    "/dat.v1.ModelService/GetModel",
    "/dat.v1.ModelService/ListModels",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelMetadata",
    "/inference.GRPCInferenceService/ServerLive",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


async def ask(server: RunningServer, method: str, sent: bytes) -> grpc.aio.AioRpcError:
    """The failure of a call with a message of these bytes."""
    async with channel(server) as open_channel:
        call: Any = open_channel.unary_unary(method)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call(sent, timeout=30)
        return failure.value


def unexpected(server: RunningServer) -> list[object]:
    """What the server logged beside its requests, so far."""
    lines = [server.log.get() for _ in range(server.log.qsize())]
    return [line for line in lines if line is None or line["event"] != "request"]


async def test_malformed_messages_are_refused_and_hurt_nobody(server):
    before = await over_grpc(server, [JPEG])
    unexpected(server)
    counts = await fuzz(server.grpc_target, 400)
    assert not BUGS & counts.keys(), counts
    assert counts["INVALID_ARGUMENT"] > 100
    assert not unexpected(server)
    after = await over_grpc(server, [JPEG])
    assert after.results[0].predictions == before.results[0].predictions
    gauges = {n: v for n, v in server.metrics().items() if n.startswith("dat_requests_in_flight")}
    assert gauges
    assert not any(gauges.values())


@pytest.mark.parametrize("method", METHODS)
async def test_bytes_that_are_no_message_are_an_invalid_request(server, method):
    for sent in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0b" * 200, b"\x0f", b"\x0a"):
        failure = await ask(server, method, sent)
        assert failure.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert dict(failure.trailing_metadata())["dat-error-code"] == "invalid_request"
        assert "malformed" in failure.details()


async def test_a_call_without_a_message_is_an_invalid_request(server):
    async with channel(server) as open_channel:
        call = open_channel.stream_unary(CLASSIFY)(iter(()), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_malformed_message_ends_a_stream_after_the_answers_of_the_others(server):
    asked = [
        dat_pb2.ClassifyStreamRequest(id=str(n), request=message([JPEG])).SerializeToString()
        for n in range(5)
    ]
    malformed_request = dat_pb2.ClassifyStreamRequest(id="5").SerializeToString() + b"\x12\x01\xff"
    method = "/dat.v1.ClassifierService/ClassifyStream"
    seen = {}
    async with channel(server) as open_channel:
        call = open_channel.stream_stream(
            method, response_deserializer=dat_pb2.ClassifyStreamResponse.FromString
        )(iter([*asked, malformed_request, b"\xff", *asked]), timeout=30)

        async def listen() -> None:
            async for answer in call:
                seen[answer.id] = answer.error.code

        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await listen()
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    # A request that is malformed within its message has an id, and so an answer of its own.
    assert seen == {**dict.fromkeys("01234", ""), "5": "invalid_request"}


@given(
    st.builds(
        dat_pb2.ClassifyRequest,
        images=st.lists(st.binary(max_size=300), max_size=8),
        model=st.text(max_size=20),
        top_k=st.none() | st.integers(0, 2**32 - 1),
    ),
    st.binary(max_size=8),
    st.integers(0, 400),
)
def test_images_are_found_as_the_parser_finds_them(request, noise, place):
    valid = request.SerializeToString()
    for sent in (valid, valid[:place] + noise + valid[place:]):
        try:
            rest, images = Received(sent).take(1, dat_pb2.ClassifyRequest, most=1000)
        except InvalidRequest:
            assert sent != valid
            continue
        parsed = dat_pb2.ClassifyRequest.FromString(sent)
        assert images == list(parsed.images)
        del parsed.images[:]
        assert rest == parsed


@pytest.mark.parametrize("sent", MALFORMED)
def test_the_parser_agrees_on_what_is_malformed(sent):
    try:
        dat_pb2.ClassifyRequest.FromString(sent)
    except DecodeError:
        with pytest.raises(InvalidRequest):
            Received(sent).take(1, dat_pb2.ClassifyRequest, most=10_000)


async def test_what_a_message_holds_is_counted_before_it_is_parsed(server):
    """Thirty million things in sixty megabytes; each would be an object or more."""
    many = 15_000_000
    sent = {
        b"\x0a\x00" * many: "too_many_images",
        b"\x32\x00" * many: "invalid_request",  # names of classes
        b"\x78\x00" * many: "invalid_request",  # fields that nobody knows
        b"\x0b\x0c" * many: "invalid_request",  # groups
        b"\x12" + varint(2 * many) + b"x" * 2 * many: "invalid_request",  # the name of a model
    }
    async with asyncio.timeout(30):
        for body, code in sent.items():
            failure = await ask(server, CLASSIFY, body)
            assert dict(failure.trailing_metadata())["dat-error-code"] == code


def varint(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])


@pytest.mark.parametrize("name", ["x" * 100_000, "\n\0\x7f\"'%" * 50, "ä€😀" * 500])
async def test_texts_of_callers_do_not_change_the_code(server, name):
    answer = await over_grpc(server, [JPEG], model=name)
    assert (answer.status, answer.error) == ("NOT_FOUND", "unknown_model")
    assert "there is 'dat_nano'" in answer.message
    assert len(answer.message) < 400
