"""A crowd of HTTP clients: requests that come whether or not the ones before were answered.

Runs in its own process and prints one JSON object. Written on bare protocols of asyncio, so that
ten times the load of the server costs this process a fraction of a core: what a crowd takes from
the machine is part of the trial, but it should be what its requests cost, not what Python does.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import uvloop

from bench.load import PICTURES, make_jpeg, process_cpu_s

MOST_CONNECTIONS = 4000
ANSWER_LIMIT_S = 60.0


@dataclass
class Tally:
    """What became of the requests of one kind in the window."""

    statuses: Counter[str] = field(default_factory=Counter)
    latencies_s: dict[str, list[float]] = field(default_factory=dict)

    def add(self, status: str, seconds: float) -> None:
        """Count one request."""
        self.statuses[status] += 1
        self.latencies_s.setdefault(status, []).append(seconds)

    def figures(self, seconds: float) -> dict[str, object]:
        """Counts, rates and latencies by status."""
        return {
            "requests_per_s": self.statuses.total() / seconds,
            "answered_per_s": self.statuses["200"] / seconds,
            "statuses": dict(self.statuses),
            "latency_ms": {
                status: {
                    f"p{percentile}": round(1e3 * float(np.percentile(latencies, percentile)), 2)
                    for percentile in (50, 90, 99)
                }
                for status, latencies in self.latencies_s.items()
            },
        }


class Connection(asyncio.Protocol):
    """One keep-alive connection, with at most one request on its way."""

    def __init__(self, crowd: "Crowd") -> None:
        self._crowd = crowd
        self._answer = bytearray()
        self._needed = 0
        self._asked: asyncio.Future[str] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what bytes are written to."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop has a class of its own

    def ask(self, request: bytes) -> asyncio.Future[str]:
        """Send a request; the future is for the status of its answer."""
        assert self.transport is not None
        self._asked = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._asked

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self._answer += data
        if not self._needed:
            end = self._answer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._answer[:end]).lower()
            start = head.index(b"content-length:") + len(b"content-length:")
            self._needed = end + 4 + int(head[start:].split(b"\r\n", 1)[0])
        if len(self._answer) >= self._needed:
            status = self._answer[9:12].decode()
            closing = b"connection: close" in self._answer[: self._needed].lower()
            self._answer.clear()
            self._needed = 0
            if self._asked is not None and not self._asked.done():
                self._asked.set_result(status)
            if closing:
                self.leave()
            else:
                self._crowd.idle.append(self)

    def connection_lost(self, _: Exception | None) -> None:
        """Tell who waits."""
        self._crowd.open.discard(self)
        if self in self._crowd.idle:
            self._crowd.idle.remove(self)
        if self._asked is not None and not self._asked.done():
            self._asked.set_result("disconnected")

    def leave(self) -> None:
        """Close at once."""
        assert self.transport is not None
        self.transport.abort()


class Crowd:
    """Clients of one server.

    Args:
        port: of the server.
        requests: sent in turn, whole.
        leave_after_s: when a client that has no answer leaves; `None`: it stays.
        ask_again: how often a client that left or was refused asks again, at once.
    """

    def __init__(
        self, port: int, requests: list[bytes], leave_after_s: float | None, ask_again: int
    ) -> None:
        self._port = port
        self._requests = itertools.cycle(requests)
        self._leave_after_s = leave_after_s
        self._ask_again = ask_again
        self.idle: list[Connection] = []
        self.open: set[Connection] = set()
        self.tally = Tally()
        self.window = (0.0, float("inf"))

    async def request(self, due: float) -> None:
        """One client that comes at a time of the clock, seconds, and may ask several times."""
        for _ in range(1 + self._ask_again):
            status = await self._ask()
            finished = time.perf_counter()
            if self.window[0] <= due < self.window[1]:
                self.tally.add(status, finished - due)
            if status == "200" or finished > self.window[1]:
                return
            due = finished

    async def _ask(self) -> str:
        connection = await self._connection()
        if connection is None:
            return "disconnected"
        asked = connection.ask(next(self._requests))
        limit = self._leave_after_s or ANSWER_LIMIT_S
        try:
            async with asyncio.timeout(limit):
                return await asked
        except TimeoutError:
            connection.leave()
            return "left"

    async def _connection(self) -> Connection | None:
        if self.idle:
            return self.idle.pop()
        if len(self.open) >= MOST_CONNECTIONS:
            return None
        loop = asyncio.get_running_loop()
        connection = Connection(self)
        self.open.add(connection)
        try:
            await loop.create_connection(lambda: connection, "127.0.0.1", self._port)
        except OSError:
            self.open.discard(connection)
            return None
        return connection


def requests(arguments: argparse.Namespace) -> list[bytes]:
    """Whole requests, heads and bodies."""
    if arguments.path.startswith("/health"):
        return [f"GET {arguments.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()]
    size = arguments.height, arguments.width
    jpegs = [make_jpeg(*size, arguments.quality, seed) for seed in range(PICTURES)]
    return [
        f"POST {arguments.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
        f"Content-Length: {len(jpeg)}\r\n\r\n".encode()
        + jpeg
        for jpeg in jpegs
    ]


async def probe(port: int, every_s: float, window: tuple[float, float], tally: Tally) -> None:
    """Ask for the health like a kubelet: one request after the other, each with a connection."""
    crowd = Crowd(port, [b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"], None, 0)
    crowd.tally, crowd.window = tally, window
    while (due := time.perf_counter()) < window[1]:
        await crowd.request(due)
        for connection in list(crowd.open):
            connection.leave()
        await asyncio.sleep(every_s)


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Send the load that the arguments describe and return its figures."""
    crowd = Crowd(arguments.port, requests(arguments), arguments.leave_after, arguments.ask_again)
    probes = Tally()
    start = time.perf_counter() + arguments.warmup
    end = start + arguments.seconds
    crowd.window = (start, end)
    arrivals = random.Random(0)

    async def cpu_in_window() -> tuple[float, float]:
        await asyncio.sleep(start - time.perf_counter())
        client, server = time.process_time(), process_cpu_s(arguments.server_pid)
        await asyncio.sleep(end - time.perf_counter())
        return time.process_time() - client, process_cpu_s(arguments.server_pid) - server

    async def caller() -> None:
        while (due := time.perf_counter()) < end:
            await crowd.request(due)

    async with asyncio.TaskGroup() as group:
        cpu = group.create_task(cpu_in_window())
        group.create_task(probe(arguments.port, arguments.probe_every, (start, end), probes))
        if arguments.concurrency:
            for _ in range(arguments.concurrency):
                group.create_task(caller())
        else:
            due = time.perf_counter()
            while (due := due + arrivals.expovariate(arguments.rate)) < end:
                late = due - time.perf_counter()
                if late > 0:
                    await asyncio.sleep(late)
                group.create_task(crowd.request(due))
    client_cpu_s, server_cpu_s = cpu.result()
    for connection in list(crowd.open):
        connection.leave()
    return crowd.tally.figures(arguments.seconds) | {
        "probes": probes.figures(arguments.seconds),
        "client_cpus": client_cpu_s / arguments.seconds,
        "server_cpus": server_cpu_s / arguments.seconds,
    }


def main() -> None:
    """Print the figures of one run as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.crowd", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--server-pid", type=int, required=True)
    parser.add_argument("--path", default="/v1/classify")
    parser.add_argument("--rate", type=float, default=100.0, help="arrivals a second")
    parser.add_argument("--concurrency", type=int, default=0, help="closed loop instead")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the window")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds before the window")
    parser.add_argument("--leave-after", type=float, help="seconds that a client waits")
    parser.add_argument("--ask-again", type=int, default=0, help="times that a client asks again")
    parser.add_argument("--probe-every", type=float, default=0.1, help="seconds between probes")
    parser.add_argument("--core", type=int, help="the one core that the crowd may use")
    parser.add_argument("--height", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    print(json.dumps(uvloop.run(run(arguments))))


if __name__ == "__main__":
    main()
