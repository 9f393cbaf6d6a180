"""What becomes of both classes of requests on a real server, whichever way a request names one."""

import asyncio
import base64
from collections import Counter
from statistics import median

import grpc
import httpx
import pytest

from bench.load import HttpClient
from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import JPEG, channel, eventually, over_grpc, over_http
from tests.server import start_server

WAITING = "dat_requests_waiting,model=dat_nano"
PLACES, FOR_LOW, ON_DEVICE = 8, 6, 2  # of `slow_server`
RAW = {"content-type": "image/jpeg"}


async def over_rpc(server, metadata=(), stream=False, **fields) -> str:
    """The code of what becomes of a call, or of the one request of a stream."""
    request = dat_pb2.ClassifyRequest(images=[JPEG], **fields)
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        try:
            if stream:
                asked = dat_pb2.ClassifyStreamRequest(id="only", request=request)
                (answer,) = [a async for a in stub.ClassifyStream([asked], metadata=metadata)]
                return str(answer.error.code) or "ok"
            await stub.Classify(request, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return str(dict(error.trailing_metadata())["dat-error-code"])
        return "ok"


async def over_web(server, path="/v1/classify", **sent) -> str:
    """The code of what becomes of a request."""
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        body = (await client.post(path, **sent)).json()
    return str(body["error"]["code"]) if "error" in body else "ok"


async def every_way(server) -> dict[str, str]:
    """What becomes of a request of the lower class, by the way in which it says so."""
    encoded = base64.b64encode(JPEG).decode()
    low = [("x-priority", "low")]
    query = "/v1/classify?priority="
    return {
        "header": await over_web(server, content=JPEG, headers=RAW | {"X-Priority": "Low"}),
        "query": await over_web(server, f"{query}low", content=JPEG, headers=RAW),
        "lower of both": await over_web(
            server, f"{query}high", content=JPEG, headers=RAW | {"X-Priority": "low"}
        ),
        "form": await over_web(server, files={"file": JPEG}, data={"priority": "low"}),
        "json": await over_web(server, json={"image": encoded, "priority": "low"}),
        "metadata": await over_rpc(server, low),
        "field": await over_rpc(server, priority=dat_pb2.PRIORITY_LOW),
        "lower of both, rpc": await over_rpc(server, low, priority=dat_pb2.PRIORITY_HIGH),
        "stream": await over_rpc(server, stream=True, priority=dat_pb2.PRIORITY_LOW),
        "metadata of stream": await over_rpc(server, low, stream=True),
    }


async def test_the_lower_class_leaves_places_to_the_upper_one_however_it_is_named(slow_server):
    server = slow_server.server
    assert set((await every_way(server)).values()) == {"ok"}
    with slow_server.fault("wait"):
        low = [("x-priority", "low")]
        crowd = [asyncio.create_task(over_rpc(server, low))]
        # Until it is on the device it has one of the places itself.
        await eventually(lambda: server.metrics()["dat_requests_running,model=dat_nano"] == 1)
        crowd += [asyncio.create_task(over_rpc(server, low)) for _ in range(19)]
        await eventually(lambda: server.metrics()[WAITING] == FOR_LOW)
        await eventually(lambda: sum(one.done() for one in crowd) >= 20 - FOR_LOW - ON_DEVICE)
        ways = await every_way(server)
        upper = [
            asyncio.create_task(classify(server, [JPEG])) for classify in (over_http, over_grpc)
        ]
        await eventually(lambda: server.metrics()[WAITING] == PLACES)
    assert ways == dict.fromkeys(ways, "overloaded")
    assert [answer.error for answer in await asyncio.gather(*upper)] == [None, None]
    became = Counter(await asyncio.gather(*crowd))
    assert FOR_LOW <= became["ok"] <= FOR_LOW + ON_DEVICE
    assert became["overloaded"] == 20 - became["ok"]


async def test_a_class_that_there_is_not_is_refused(server):
    urgent = [("x-priority", "urgent")]
    headers = RAW | dict(urgent)
    assert await over_web(server, content=JPEG, headers=headers) == "invalid_option"
    path = "/v1/classify?priority=urgent"
    assert await over_web(server, path, content=JPEG, headers=RAW) == "invalid_option"
    assert await over_rpc(server, urgent) == "invalid_option"
    assert await over_rpc(server, urgent, stream=True) == "invalid_option"
    assert await over_rpc(server, priority=7) == "invalid_option"


@pytest.fixture(scope="module")
def flooded_server():
    with start_server(DAT_MODEL__NAME="dat_nano", DAT_ENGINE__THREADS=1) as running:
        yield running


async def test_a_flood_of_the_lower_class_leaves_the_upper_one_alone_and_is_answered(
    flooded_server,
):
    port = int(flooded_server.http_url.rsplit(":", 1)[1])
    lower = HttpClient(port, "/v1/classify?priority=low")
    upper = HttpClient(port, "/v1/classify")
    low: Counter[str] = Counter()
    high: Counter[str] = Counter()
    meanwhile, enough = [], asyncio.Event()

    async def always() -> None:
        while not enough.is_set():
            low[(await lower.send(JPEG)).status] += 1

    everybody = [asyncio.create_task(always()) for _ in range(64)]
    await eventually(lambda: low.total() >= 64)
    for _ in range(15):
        before = low.total()
        high[(await upper.send(JPEG)).status] += 1
        meanwhile.append(low.total() - before)
    enough.set()
    await asyncio.gather(*everybody)
    for client in (lower, upper):
        client.close()
    await asyncio.sleep(0)  # until the connections are closed
    assert set(high) == {"200"}
    assert set(low) == {"200"}
    # First come, first served it would be all 64 of them: eight batches, and not two or three.
    assert median(meanwhile) < 40
