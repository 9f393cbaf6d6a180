"""Load generator: sends JPEGs to a running server and prints what came back as one JSON object.

Runs in its own process so that its CPU time is its own. The client is asyncio streams over
HTTP/1.1 keep-alive, or grpc.aio: a general HTTP library would cost more CPU than the server's
front end.
"""

import argparse
import asyncio
import io
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from PIL import Image

from service.pb.dat_pb2 import ClassifyRequest, DetectRequest, Timing
from service.pb.dat_pb2_grpc import ClassifierServiceStub, DetectorServiceStub

REQUEST_TIMEOUT_S = 60.0
PICTURES = 16  # sent in turn
TASKS = ("classify", "detect")


def make_jpeg(height: int, width: int, quality: int, seed: int) -> bytes:
    """Encode a smooth random picture with some noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + generator.integers(-6, 7, smooth.shape, dtype=np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()


class Reply(NamedTuple):
    """What one request got: its status, and the size and compute time of its batch."""

    status: str
    batch_size: int = 0
    compute_s: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the image has its answer."""
        return self.batch_size > 0


class HttpClient:
    """HTTP/1.1 over a pool of keep-alive connections."""

    def __init__(self, port: int, task: str) -> None:
        self._port, self._task = port, task
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, jpeg: bytes) -> Reply:
        """Send one image; the status is the HTTP code, or `disconnected`."""
        try:
            streams = (
                self._idle.pop()
                if self._idle
                else await asyncio.open_connection("127.0.0.1", self._port)
            )
            status, headers, body = await self._exchange(*streams, jpeg)
        except (OSError, asyncio.IncompleteReadError):
            return Reply("disconnected")
        if headers.get("connection") == "close":
            streams[1].close()
        else:
            self._idle.append(streams)
        if status != "200":
            return Reply(status)
        timing = json.loads(body)["results"][0]["timing"]
        return Reply(status, timing["batch_size"], timing["compute_s"])

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, jpeg: bytes
    ) -> tuple[str, dict[str, str], bytes]:
        head = (
            f"POST /v1/{self._task} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
        )
        writer.write(head.encode() + jpeg)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status_line, *lines = answer.strip().splitlines()
        headers = dict(line.split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
        return status_line.split()[1], headers, body


class GrpcClient:
    """Unary calls over one HTTP/2 channel."""

    def __init__(self, port: int, task: str) -> None:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._call = {"classify": self._classify, "detect": self._detect}[task]
        self._classifier = ClassifierServiceStub(channel)
        self._detector = DetectorServiceStub(channel)

    async def send(self, jpeg: bytes) -> Reply:
        """Send one image; the status is the name of the gRPC code."""
        try:
            timing = await self._call(jpeg)
        except grpc.aio.AioRpcError as failure:
            return Reply(failure.code().name)
        return Reply("OK", timing.batch_size, timing.compute_s)

    async def _classify(self, jpeg: bytes) -> Timing:
        answer = await self._classifier.Classify(ClassifyRequest(images=[jpeg]))
        timing: Timing = answer.results[0].classification.timing
        return timing

    async def _detect(self, jpeg: bytes) -> Timing:
        answer = await self._detector.Detect(DetectRequest(images=[jpeg]))
        timing: Timing = answer.results[0].image.timing
        return timing


CLIENTS: dict[str, type[HttpClient] | type[GrpcClient]] = {"http": HttpClient, "grpc": GrpcClient}


@dataclass(frozen=True)
class Answer:
    """One request: when it was due, when it was answered, and how."""

    due: float
    finished: float
    reply: Reply


class Load:
    """Requests sent by one run, and their answers."""

    def __init__(self, send: Callable[[bytes], Awaitable[Reply]], jpegs: list[bytes]) -> None:
        self._request = send
        self._jpegs = itertools.cycle(jpegs)
        self.answers: list[Answer] = []

    async def closed_loop(self, concurrency: int, end: float) -> None:
        """Keep `concurrency` requests in flight until `end`."""

        async def caller() -> None:
            while time.perf_counter() < end:
                await self._send(time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(caller())

    async def open_loop(self, rate: float, end: float) -> None:
        """Send Poisson arrivals, `rate` a second, until `end`; nobody waits for anybody.

        Latency counts from the moment a request was due, so a late client does not flatter
        the server.
        """
        arrivals = random.Random(0)
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while (due := due + arrivals.expovariate(rate)) < end:
                await asyncio.sleep(due - time.perf_counter())
                group.create_task(self._send(due))

    async def _send(self, due: float) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                reply = await self._request(next(self._jpegs))
        except TimeoutError:
            reply = Reply("timeout")
        self.answers.append(Answer(due, time.perf_counter(), reply))


def process_cpu_s(pid: int) -> float:
    """CPU seconds used so far by a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summarize(answers: list[Answer], start: float, end: float) -> dict[str, object]:
    """Figures of the window: throughput of answers in it, latency of requests due in it.

    Answers come in batches, so a window with fixed ends would hold one more or one less by
    chance. Throughput therefore counts from the last answer before the window to the last in it.
    """
    answered = [a for a in answers if a.reply.ok and start <= a.finished < end]
    began = max((a.finished for a in answers if a.finished < start), default=start)
    seconds = max((a.finished for a in answered), default=end) - began
    due = [a for a in answers if start <= a.due < end]
    figures: dict[str, object] = {
        "images_per_s": len(answered) / seconds,
        "engine_busy": sum(a.reply.compute_s / a.reply.batch_size for a in answered) / seconds,
        "images_by_batch_size": dict(Counter(a.reply.batch_size for a in answered)),
        "requests": len(due),
        "statuses": dict(Counter(a.reply.status for a in due)),
    }
    latencies_ms = [1e3 * (a.finished - a.due) for a in due if a.reply.ok]
    if latencies_ms:
        for percentile in (50, 90, 99):
            figures[f"p{percentile}_ms"] = float(np.percentile(latencies_ms, percentile))
    return figures


async def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Send the load that the arguments describe and return its figures."""
    size = arguments.height, arguments.width
    jpegs = [make_jpeg(*size, arguments.quality, seed) for seed in range(PICTURES)]
    client = CLIENTS[arguments.protocol](arguments.port, arguments.task)
    load = Load(client.send, jpegs)
    start = time.perf_counter() + arguments.warmup
    end = start + arguments.seconds

    async def cpu_in_window() -> tuple[float, float]:
        await asyncio.sleep(start - time.perf_counter())
        client, server = time.process_time(), process_cpu_s(arguments.server_pid)
        await asyncio.sleep(end - time.perf_counter())
        return time.process_time() - client, process_cpu_s(arguments.server_pid) - server

    cpu = asyncio.create_task(cpu_in_window())
    if arguments.rate is None:
        await load.closed_loop(arguments.concurrency, end)
    else:
        await load.open_loop(arguments.rate, end)
    client_cpu_s, server_cpu_s = await cpu
    return summarize(load.answers, start, end) | {
        "client_cpu_s": client_cpu_s,
        "server_cpu_s": server_cpu_s,
        "jpeg_bytes": round(float(np.mean([len(jpeg) for jpeg in jpegs]))),
    }


def main() -> None:
    """Print the figures of one run as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--protocol", choices=CLIENTS, default="http")
    parser.add_argument("--task", choices=TASKS, default="classify")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--server-pid", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=1, help="closed loop")
    parser.add_argument("--rate", type=float, help="open loop: arrivals a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the window")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds before the window")
    parser.add_argument("--height", type=int, default=256, help="of the images, pixels")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
