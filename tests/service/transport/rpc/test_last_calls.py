"""A server that stops under calls answers them, or says UNAVAILABLE, which clients try again."""

import asyncio
from collections import Counter

import grpc
import pytest

from service.pb import dat_pb2_grpc
from tests.clients import JPEG, eventually, message, own_channel
from tests.faults import SHAPES
from tests.server import RunningServer, start_server

CALLERS = 12


async def ask_until_refused(server: RunningServer, told: Counter[str]) -> None:
    async with own_channel(server.grpc_target) as connection:
        stub = dat_pb2_grpc.ClassifierServiceStub(connection)
        while True:
            try:
                await stub.Classify(message([JPEG]))
            except grpc.aio.AioRpcError as error:
                told[error.code().name] += 1
                return
            told["ok"] += 1


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
async def test_no_call_is_cancelled_by_a_server_that_stops(shape):
    settings = {"DAT_ENGINE__THREADS": 1, "DAT_LIMITS__DEFAULT_TIMEOUT_S": 100}
    told: Counter[str] = Counter()
    with start_server(DAT_MODEL__NAME="dat_nano", **settings, **SHAPES[shape]) as server:
        callers = [asyncio.create_task(ask_until_refused(server, told)) for _ in range(CALLERS)]
        await eventually(lambda: told["ok"] > 20 * CALLERS)
        server.process.terminate()
        await asyncio.gather(*callers)
        assert await asyncio.to_thread(server.process.wait, 60) == 0
    assert set(told) == {"ok", "UNAVAILABLE"}
