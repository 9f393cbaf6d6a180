"""Send malformed messages to every gRPC method of a running server, and count what it answers.

Valid messages are changed in a few places each, and some are random bytes. A server may refuse
any of them, but UNKNOWN and INTERNAL would be bugs.
"""

import argparse
import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from bench.load import make_jpeg
from service.pb import dat_pb2
from tests.service.transport.oip.asking import files, pixels
from tests.service.transport.oip.asking import message as tensor_message

CONCURRENCY = 16
TIMEOUT_S = 60.0
STREAM_GOES_ON = 0.6  # how likely one more message is
BUGS = {"UNKNOWN", "INTERNAL", "engine_failed"}

_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_STREAMS = {
    "/dat.v1.ClassifierService/ClassifyStream",
    "/dat.v1.DetectorService/DetectStream",
    "/inference.GRPCInferenceService/ModelStreamInfer",
    "/dat.v1.SegmenterService/SegmentStream",
    _REFLECTION,
}
_WATCH = "/grpc.health.v1.Health/Watch"  # has no end
# What mutation alone would seldom hit upon.
MALFORMED = (
    b"",
    b"\x0a",  # a field without a length
    b"\x0a\xff\xff\xff\xff\x0f",  # a length of 4 GiB
    b"\xff" * 11,  # a number without an end
    b"\x8a\x80\x80\x80\x80\x00\x01x",  # a tag in more bytes than it needs
    b"\x12\x02\xc3\x28",  # text that is no UTF-8
    b"\x12\x03\xed\xa0\x80",  # half of a surrogate pair
    b"\x08\x01\x10\x01\x18\x01\x20\x01",  # numbers where bytes belong
    b"\x0d\x00\x00\x00\x00\x11" + bytes(8),  # and numbers of a fixed size
    b"\x20\x63\x38\x63\x40\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # values that no enum has
    b"\x0b\x0a\x01x\x0c",  # a group
    b"\x0b\x14",  # a group that ends as another
    b"\x0b" * 200 + b"\x0c" * 200,  # groups in groups
    b"\x0c",  # the end of none
    b"\x0e\x0f",  # types that there are not
    b"\x02\x00\x00",  # a field of the number 0
    b"\x0a\x00" * 40,  # empty images
    b"\x32\x00" * 12_000,  # as many empty names
    b"\x12\x0a\x12\x08" * 30,  # messages in messages
)


def _valid_messages() -> dict[str, list[bytes]]:
    """For each method some messages that it takes."""
    jpeg = make_jpeg(24, 24, 80, seed=0)
    classify = [
        dat_pb2.ClassifyRequest(images=[jpeg]),
        dat_pb2.ClassifyRequest(images=[jpeg, b"no image"], model="dat_nano", top_k=3),
        dat_pb2.ClassifyRequest(images=[jpeg[:200]], top_k=0),
    ]
    detect = [
        dat_pb2.DetectRequest(images=[jpeg], classes=["star", "disc"], score_threshold=0.3),
        dat_pb2.DetectRequest(images=[b""], masks="MASK_FORMAT_RLE", max_detections=7),
    ]
    infer = [
        tensor_message([files([jpeg])]),
        tensor_message([pixels([[[[1, 2, 3]]]])], typed=True, id="7"),
    ]
    segment = [
        dat_pb2.SegmentRequest(images=[jpeg], classes=["star"], min_share=0.3, confidence=True),
        dat_pb2.SegmentRequest(images=[b""], format="SEGMENT_FORMAT_RLE"),
    ]
    models = dat_pb2.GetModelRequest(name="dat_nano"), dat_pb2.GetModelRequest()
    health = [
        health_pb2.HealthCheckRequest(service=name) for name in ("", "dat.v1.ModelService", "x")
    ]
    ask = reflection_pb2.ServerReflectionRequest
    extension = reflection_pb2.ExtensionRequest(containing_type="dat.v1.Label", extension_number=3)
    methods: dict[str, Sequence[Message]] = {
        "/dat.v1.ClassifierService/Classify": classify,
        "/dat.v1.ClassifierService/ClassifyStream": [
            dat_pb2.ClassifyStreamRequest(id=str(n), request=r) for n, r in enumerate(classify)
        ],
        "/dat.v1.DetectorService/Detect": detect,
        "/dat.v1.DetectorService/DetectStream": [
            dat_pb2.DetectStreamRequest(id=str(n), request=r) for n, r in enumerate(detect)
        ],
        "/dat.v1.SegmenterService/Segment": segment,
        "/dat.v1.SegmenterService/SegmentStream": [
            dat_pb2.SegmentStreamRequest(id=str(n), request=r) for n, r in enumerate(segment)
        ],
        "/dat.v1.ModelService/GetModel": models,
        "/dat.v1.ModelService/ListModels": [dat_pb2.ListModelsRequest()],
        "/inference.GRPCInferenceService/ModelInfer": infer,
        "/inference.GRPCInferenceService/ModelStreamInfer": infer,
        "/grpc.health.v1.Health/Check": health,
        _WATCH: health,
        _REFLECTION: [
            ask(list_services=""),
            ask(file_by_filename="service/pb/dat.proto"),
            ask(file_containing_symbol="dat.v1.ModelService"),
            ask(file_containing_extension=extension),
            ask(all_extension_numbers_of_type="dat.v1.Label"),
        ],
    }
    return {
        method: [message.SerializeToString() for message in messages]
        for method, messages in methods.items()
    }


def _changed(message: bytes, generator: random.Random) -> bytes:
    changed = bytearray(message)
    for _ in range(generator.randint(1, 4)):
        # Near the beginning are the tags and lengths.
        reach = generator.choice((8, 64, len(changed) + 1))
        where = generator.randrange(min(reach, len(changed) + 1))
        what = generator.randbytes(generator.choice((1, 1, 2, 10)))
        match generator.randrange(5):
            case 0:
                changed[where : where + len(what)] = what
            case 1:
                changed[where:where] = what
            case 2:
                del changed[where : where + generator.choice((1, 3, 1000))]
            case 3:
                changed[where:where] = changed[where : where + 20] * generator.randint(1, 50)
            case 4:
                changed[where:where] = generator.choice(MALFORMED)
    return bytes(changed)


def _make_input(valid: list[bytes], others: list[bytes], generator: random.Random) -> bytes:
    match generator.randrange(10):
        case 0:
            return generator.randbytes(generator.choice((1, 5, 50, 2000)))
        case 1:
            return generator.choice(MALFORMED)
        case 2:
            return generator.choice(others)
        case _:
            return _changed(generator.choice(valid), generator)


async def _each(messages: list[bytes]) -> AsyncIterator[Any]:
    for message in messages:
        yield message


async def _send(channel: grpc.aio.Channel, method: str, messages: list[bytes]) -> str:
    """The code that a call with these messages ends with; on the wire all calls are streams."""
    call: Any = channel.stream_stream(method)(_each(messages), timeout=TIMEOUT_S)
    try:
        async for answer in call:
            if b"engine_failed" in answer:  # of one image, or of one request of a stream
                return "engine_failed"
            if method == _WATCH:
                call.cancel()
                return "OK"
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


async def fuzz(target: str, inputs: int, seed: int = 0) -> Counter[str]:
    """Send so many messages, and count the codes of the calls.

    Args:
        target: host and port of a server.
        inputs: messages; some calls of streams have several.
        seed: of what is sent.
    """
    generator = random.Random(seed)
    valid = _valid_messages()
    others = [message for messages in valid.values() for message in messages]
    left = iter(range(inputs))
    counts: Counter[str] = Counter()

    async with grpc.aio.insecure_channel(target) as channel:

        async def work() -> None:
            for _ in left:
                method = generator.choice(list(valid))
                messages = [_make_input(valid[method], others, generator)]
                while (
                    method in _STREAMS
                    and generator.random() < STREAM_GOES_ON
                    and next(left, None) is not None
                ):
                    messages.append(_make_input(valid[method], others, generator))
                counts[await _send(channel, method, messages)] += 1

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return counts


def main() -> None:
    """Fuzz one server and print the counts; exit with 1 if a bug was seen."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.service.transport.rpc.fuzz", description=__doc__
    )
    parser.add_argument("--target", default="127.0.0.1:8001")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = asyncio.run(fuzz(arguments.target, arguments.inputs, arguments.seed))
    print(json.dumps(dict(counts.most_common()), indent=2))
    sys.exit(bool(BUGS & counts.keys()))


if __name__ == "__main__":
    main()
