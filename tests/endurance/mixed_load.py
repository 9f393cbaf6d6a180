"""Callers of all kinds at once, who keep count of what they were told."""

import asyncio
import io
import random
from collections import Counter
from contextlib import suppress

import grpc
import httpx
from PIL import Image

from service.pb import dat_pb2_grpc
from tests.clients import JPEG, encoded, message, own_channel
from tests.server import RunningServer

CONNECTION_LOST = "connection lost"


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "#567").save(file, "PNG")
    return file.getvalue()


GOOD = [JPEG, encoded(index=1, size=(100, 130)), picture(300)]
BAD = [b"no image", JPEG[: len(JPEG) // 2], b""]


class MixedLoad:
    """Callers over HTTP and gRPC, with good and bad images, some of whom leave.

    Args:
        server: that they ask.
        seed: of what they do.
        leaving: share of the callers who leave before they are answered.

    Attributes:
        sent: images.
        told: how often each code was told, an `ok` included.
        left: images whose callers left; nobody knows what became of these.
    """

    def __init__(self, server: RunningServer, seed: int, leaving: float = 0.1) -> None:
        self.sent = 0
        self.told: Counter[str] = Counter()
        self.left = 0
        self._server = server
        self._random = random.Random(seed)
        self._leaving = leaving

    async def run(self, callers: int, seconds: float) -> None:
        """Let so many callers ask, one request after the other, for so long."""
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(callers):
                group.create_task(self._call(end, over_grpc=number % 2 == 1))

    async def _call(self, end: float, *, over_grpc: bool) -> None:
        loop = asyncio.get_running_loop()
        async with (
            httpx.AsyncClient(base_url=self._server.http_url, timeout=100) as client,
            own_channel(self._server.grpc_target) as channel,
        ):
            stub = dat_pb2_grpc.ClassifierServiceStub(channel)
            while loop.time() < end:
                image = self._random.choice(GOOD * 4 + BAD)
                ask = self._ask_grpc(stub, image) if over_grpc else self._ask_http(client, image)
                self.sent += 1
                if self._random.random() >= self._leaving:
                    code = await ask
                    self.told[code] += 1
                    if code != "ok":  # as a polite caller would
                        await asyncio.sleep(0.02)
                    continue
                asking = asyncio.create_task(ask)
                await asyncio.wait([asking], timeout=self._random.random() * 0.1)
                if asking.done():
                    self.told[asking.result()] += 1
                else:
                    self.left += 1
                    asking.cancel()
                    with suppress(asyncio.CancelledError):
                        await asking

    async def _ask_http(self, client: httpx.AsyncClient, image: bytes) -> str:
        explained = {"explain": "points"} if self._random.random() < 0.1 else {}
        headers = {"content-type": "application/octet-stream"}
        try:
            answer = await client.post(
                "/v1/classify", content=image, params=explained, headers=headers
            )
        except httpx.TransportError:
            return CONNECTION_LOST
        body = answer.json()
        return str(body["error"]["code"]) if "error" in body else "ok"

    async def _ask_grpc(self, stub: dat_pb2_grpc.ClassifierServiceStub, image: bytes) -> str:
        try:
            await stub.Classify(message([image]), timeout=100)
        except grpc.aio.AioRpcError as error:
            told = dict(error.trailing_metadata() or ())
            return str(told.get("dat-error-code", CONNECTION_LOST))
        return "ok"
