"""Deadlines, classes and callers that leave, by the means of the protocol, reach the queue."""

import asyncio
import json
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from service.pb import inference_pb2_grpc
from tests.clients import JPEG, channel, eventually
from tests.server import RunningServer
from tests.service.transport.oip.asking import INFER, MODEL, files, in_binary, message, parameters
from tests.tallies import in_flight, outcomes

WAITING, RUNNING = (f"dat_requests_{state},model={MODEL}" for state in ("waiting", "running"))
PLACES, FOR_LOW = 8, 6  # of `slow_server`
ONE = files([JPEG])


async def over_rest(server: RunningServer, **given: Any) -> tuple[int, dict[str, str], str]:
    head = json.dumps({"inputs": [in_binary(ONE)], "parameters": given}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        answer = await client.post(INFER, content=head + ONE.raw, headers=headers)
    sentence = "" if answer.status_code == 200 else answer.json()["error"]
    return answer.status_code, dict(answer.headers), sentence


async def over_rpc(
    server: RunningServer, timeout_s: float = 60, **given: Any
) -> tuple[str, dict[str, Any], str]:
    request = message([ONE], parameters=parameters(**given))
    async with channel(server) as open_channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(open_channel)
        try:
            await stub.ModelInfer(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            return error.code().name, dict(error.trailing_metadata()), error.details() or ""
    return "OK", {}, ""


async def test_a_timeout_in_microseconds_ends_what_waits_for_the_device(slow_server):
    server = slow_server.server
    # Other tests had its batches take seconds, and it is to foretell that there is time enough.
    for _ in range(20):
        assert [(await ask(server))[0] for ask in (over_rest, over_rpc)] == [200, "OK"]
    with slow_server.fault("wait"):
        blocker = asyncio.create_task(over_rpc(server))
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        status, _, sentence = await over_rest(server, timeout=300_000)
        assert (status, "deadline" in sentence) == (504, True)
        code, metadata, sentence = await over_rpc(server, timeout=300_000)
        assert (code, "deadline" in sentence) == ("DEADLINE_EXCEEDED", True)
        assert metadata["dat-error-code"] == "deadline_exceeded"
        # The sooner of both holds.
        assert (await over_rpc(server, timeout_s=0.3, timeout=60_000_000))[0] == "DEADLINE_EXCEEDED"
        await eventually(lambda: server.metrics()[WAITING] == 0)
    assert (await blocker)[0] == "OK"
    # 0 means that there is none.
    assert (await over_rest(server, timeout=0))[0] == 200


async def test_a_number_above_one_is_the_lower_class(slow_server):
    server = slow_server.server
    with slow_server.fault("wait"):
        crowd = [asyncio.create_task(over_rpc(server, priority=2))]
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        crowd += [asyncio.create_task(over_rest(server, priority=5)) for _ in range(12)]
        await eventually(lambda: server.metrics()[WAITING] == FOR_LOW)
        await eventually(lambda: sum(one.done() for one in crowd) >= 12 - FOR_LOW)
        status, headers, sentence = await over_rest(server, priority=2)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert sentence
        code, metadata, _ = await over_rpc(server, priority=2)
        assert (code, metadata["dat-error-code"]) == ("RESOURCE_EXHAUSTED", "overloaded")
        assert int(metadata["grpc-retry-pushback-ms"]) >= 1
        upper = [
            asyncio.create_task(over_rest(server, priority=1)),
            asyncio.create_task(over_rpc(server, priority=0)),
        ]
        await eventually(lambda: server.metrics()[WAITING] == PLACES)
        # Now it is the gate that refuses, in the form of the protocol.
        status, _, sentence = await over_rest(server)
        assert (status, bool(sentence)) == (429, True)
    assert [(await one)[0] for one in upper] == [200, "OK"]
    assert {str(one[0]) for one in await asyncio.gather(*crowd)} == {"OK", "200", "429"}


async def test_a_caller_that_leaves_takes_its_images_out_of_the_queue(slow_server):
    server = slow_server.server
    before = outcomes(server)["cancelled"]
    with slow_server.fault("wait"):
        blocker = asyncio.create_task(over_rpc(server))
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        leaving = [asyncio.create_task(ask(server)) for ask in (over_rest, over_rpc)]
        await eventually(lambda: server.metrics()[WAITING] == 2)
        for one in leaving:
            one.cancel()
        await eventually(lambda: server.metrics()[WAITING] == 0)
    assert (await blocker)[0] == "OK"
    await eventually(lambda: in_flight(server) == 0)
    assert outcomes(server)["cancelled"] == before + 2


async def test_images_of_one_request_are_answered_together_or_refused_together(slow_server):
    """More images than there are places get none of them."""
    server = slow_server.server
    with slow_server.fault("wait"):
        blocker = asyncio.create_task(over_rpc(server))
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        waits = asyncio.create_task(over_rpc(server))
        await eventually(lambda: server.metrics()[WAITING] == 1)
        async with channel(server) as open_channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(open_channel)
            try:
                await stub.ModelInfer(message([files([JPEG] * PLACES)]))
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
        assert code == "RESOURCE_EXHAUSTED"
        assert server.metrics()[WAITING] == 1
    assert [(await one)[0] for one in (blocker, waits)] == ["OK", "OK"]


async def test_health_of_the_service_and_its_description(server):
    name = "inference.GRPCInferenceService"
    async with channel(server) as open_channel:
        stub = health_pb2_grpc.HealthStub(open_channel)
        said = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert said.status == health_pb2.HealthCheckResponse.SERVING

    def described() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(server.grpc_target) as plain:
            database = ProtoReflectionDescriptorDatabase(plain)
            found = database.FindFileContainingSymbol(name)
            return database.get_services(), [one.name for one in found.service[0].method]

    services, methods = await asyncio.to_thread(described)
    assert name in services
    assert "ModelInfer" in methods
