"""Load generator for any server that answers a POST of a JPEG: prints its figures as JSON.

Runs in its own process, with as many keep-alive connections as requests in flight, each with a
request on its way all the time.
"""

import asyncio
import itertools
import json
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import uvloop

from bench.harness import options
from bench.load import PICTURES, make_jpeg, percentiles
from bench.peers.processes import cpu_s, marked

HOST = "127.0.0.1"
SIZE = (256, 256)
QUALITY = 90
LONGEST_S = 60.0
_ENDLESS = 1 << 60
_LAST_CHUNK = b"\r\n0\r\n\r\n"


def make_request(path: str, header: str, jpeg: bytes) -> bytes:
    """A request as bytes.

    Args:
        path: of the request.
        header: one line beside those that every request has; may be empty.
        jpeg: the body.
    """
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: image/jpeg",
        f"Content-Length: {len(jpeg)}",
        *filter(None, [header]),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + jpeg


def jpegs() -> list[bytes]:
    """The images that are sent in turn."""
    return [make_jpeg(*SIZE, QUALITY, seed) for seed in range(PICTURES)]


@dataclass(frozen=True)
class Answer:
    """When an image was sent and answered, and with which status."""

    sent: float
    finished: float
    status: str


class Caller(asyncio.Protocol):
    """A connection that sends a request whenever the one before it was answered.

    Args:
        requests: to be sent.
        answers: where it adds to.
        end: when it stops, as `time.perf_counter` says it.

    Attributes:
        ended: set when nothing is on its way any more.
    """

    def __init__(self, requests: Iterator[bytes], answers: list[Answer], end: float) -> None:
        self._requests, self._answers, self._end = requests, answers, end
        self._received = bytearray()
        self._needed = 0
        self._sent = 0.0
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop has a class of its own
        self._send()

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self._received += data
        if not self._needed and (end := self._received.find(b"\r\n\r\n") + 4) >= 4:
            head = bytes(self._received[:end]).lower()
            _, _, length = head.partition(b"\r\ncontent-length:")
            # Else it comes in chunks.
            self._needed = end + int(length.split(b"\r\n", 1)[0]) if length else _ENDLESS
        complete = (
            self._received.endswith(_LAST_CHUNK)
            if self._needed == _ENDLESS
            else 0 < self._needed <= len(self._received)
        )
        if complete:
            self._answered(self._received[9:12].decode())

    def connection_lost(self, _: Exception | None) -> None:
        """A server that closes a connection does not answer."""
        if not self.ended.is_set():
            self._answers.append(Answer(self._sent, time.perf_counter(), "disconnected"))
            self.ended.set()

    def _send(self) -> None:
        self._received.clear()
        self._needed = 0
        self._sent = time.perf_counter()
        self._transport.write(next(self._requests))

    def _answered(self, status: str) -> None:
        finished = time.perf_counter()
        self._answers.append(Answer(self._sent, finished, status))
        if finished < self._end:
            self._send()
        else:
            self.ended.set()
            self._transport.close()


def summarize(answers: list[Answer], start: float, end: float) -> dict[str, Any]:
    """Figures of a window: the rate of answers in it, and latencies of requests sent in it.

    Answers come in batches, so the rate counts from the last answer before the window to the last
    in it.
    """
    good = sorted(one.finished for one in answers if one.status == "200")
    inside = [finished for finished in good if start <= finished < end]
    began = max((finished for finished in good if finished < start), default=start)
    sent = [one for one in answers if start <= one.sent < end]
    latencies = [1e3 * (one.finished - one.sent) for one in sent if one.status == "200"]
    return {
        "requests_per_s": len(inside) / (inside[-1] - began) if inside else 0.0,
        **{f"{rank}_ms": value for rank, value in percentiles(latencies).items()},
        "statuses": dict(Counter(one.status for one in sent)),
    }


async def run(chosen: Namespace) -> dict[str, Any]:
    """Send the load that the options describe and return its figures."""
    requests = itertools.cycle([make_request(chosen.path, chosen.header, jpeg) for jpeg in jpegs()])
    answers: list[Answer] = []
    loop, pids = asyncio.get_running_loop(), marked(chosen.mark)
    start = time.perf_counter() + chosen.warmup
    end = start + chosen.seconds
    caller = partial(Caller, requests, answers, end)
    callers = [
        (await loop.create_connection(caller, HOST, chosen.port))[1]
        for _ in range(chosen.concurrency)
    ]
    cpu = []
    for moment in (start, end):
        await asyncio.sleep(moment - time.perf_counter())
        cpu.append((cpu_s(pids), time.process_time()))
    async with asyncio.timeout(LONGEST_S):
        await asyncio.gather(*(caller.ended.wait() for caller in callers))
    (server, client), (server_end, client_end) = cpu
    return summarize(answers, start, end) | {
        "server_cpus": (server_end - server) / chosen.seconds,
        "client_cpus": (client_end - client) / chosen.seconds,
    }


def main() -> None:
    """Print the figures of one run as JSON; all times are seconds."""
    chosen = options(
        "bench.peers.load",
        __doc__,
        port=0,
        path="/",
        header="",
        mark="",
        concurrency=1,
        seconds=4.0,
        warmup=1.0,
    )
    print(json.dumps(uvloop.run(run(chosen))))


if __name__ == "__main__":
    main()
