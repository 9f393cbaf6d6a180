"""Load generator: sends JPEGs to a running server and prints what came back as one JSON object.

Runs in its own process so that its CPU time is its own, and speaks HTTP/1.1 over bare streams of
asyncio, or grpc.aio: a crowd that asks for ten times what a server can answer should cost the
machine what its requests cost, not what a general HTTP library does.
"""

import asyncio
import io
import itertools
import json
import os
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import grpc
import numpy as np
import uvloop
from PIL import Image

from bench.harness import Row, options
from service.pb.dat_pb2 import ClassifyRequest, DetectRequest
from service.pb.dat_pb2_grpc import ClassifierServiceStub, DetectorServiceStub
from service.processes.birth import Birth

PICTURES = 16  # sent in turn
PATIENCE_S = 60.0
MOST_CONNECTIONS = 4000
ANSWERED = {"200", "OK"}

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def make_jpeg(height: int, width: int, quality: int = 90, seed: int = 0) -> bytes:
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
    """HTTP/1.1 over a pool of keep-alive connections.

    Args:
        port: of the server.
        path: of all requests.
        patience_s: after so many seconds without an answer it leaves.
    """

    def __init__(
        self, port: int, path: str, patience_s: float = PATIENCE_S, channels: int = 1
    ) -> None:
        del channels  # there are as many connections as requests in flight
        self._port, self._path, self._patience_s = port, path, patience_s
        self._idle: list[Connection] = []
        self._in_flight = 0
        self._requests: dict[bytes, bytes] = {}

    async def send(self, jpeg: bytes) -> Reply:
        """Send one image; one that is empty asks with `GET`.

        The status is the HTTP code, `disconnected`, or `left`.
        """
        if self._in_flight >= MOST_CONNECTIONS:
            return Reply("disconnected")
        connection = None
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._patience_s):
                connection = self._reused() or await asyncio.open_connection(
                    "127.0.0.1", self._port
                )
                status, body = await self._ask(connection, self._request(jpeg))
        except (OSError, EOFError) as failure:
            if connection:
                connection[1].transport.abort()
            return Reply("left" if isinstance(failure, TimeoutError) else "disconnected")
        finally:
            self._in_flight -= 1
        return Reply(status) if status != "200" or not jpeg else self.reply(body)

    def reply(self, body: bytes) -> Reply:
        """What an answer with the status 200 says of the image."""
        timing = json.loads(body)["results"][0].get("timing", {})
        return Reply("200", timing.get("batch_size", 0), timing.get("compute_s", 0.0))

    def content(self, jpeg: bytes) -> tuple[dict[str, object], bytes]:
        """The headers of a request beside its length, and its body."""
        return {"Content-Type": "image/jpeg"}, jpeg

    def close(self) -> None:
        """Close what is idle."""
        while connection := self._reused():
            connection[1].transport.abort()

    def _reused(self) -> Connection | None:
        """A connection that is idle and that the server has not closed."""
        while self._idle:
            if not (connection := self._idle.pop())[0].at_eof():
                return connection
            connection[1].close()
        return None

    async def _ask(self, connection: Connection, request: bytes) -> tuple[str, bytes]:
        """The status and the body of the answer; the connection is idle or closed after it."""
        reader, writer = connection
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0]
        body = await reader.readexactly(int(length))
        if b"\r\nconnection: close" in head:
            writer.close()
        else:
            self._idle.append(connection)
        return head[9:12].decode(), body

    def _request(self, jpeg: bytes) -> bytes:
        if jpeg not in self._requests:
            headers, body = self.content(jpeg) if jpeg else ({}, b"")
            lines = [
                f"{'POST' if jpeg else 'GET'} {self._path} HTTP/1.1",
                *(f"{name}: {value}" for name, value in headers.items()),
                "Host: localhost",
                f"Content-Length: {len(body)}\r\n\r\n",
            ]
            self._requests[jpeg] = "\r\n".join(lines).encode() + body
        return self._requests[jpeg]


class GrpcClient:
    """Unary calls over HTTP/2 channels in turn; the path is that of HTTP for the same task.

    Args:
        port: of the server.
        path: as above.
        patience_s: after so many seconds without an answer it leaves.
        channels: each a connection of its own.
    """

    def __init__(
        self, port: int, path: str, patience_s: float = PATIENCE_S, channels: int = 1
    ) -> None:
        # Without the option all channels of a process to one address share a connection.
        own = [("grpc.use_local_subchannel_pool", 1)]
        opened = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", own) for _ in range(channels)]
        self._detects, self._patience_s = path == "/v1/detect", patience_s
        self._classify = itertools.cycle([ClassifierServiceStub(one).Classify for one in opened])
        self._detect = itertools.cycle([DetectorServiceStub(one).Detect for one in opened])

    async def send(self, jpeg: bytes) -> Reply:
        """Send one image; the status is the name of the gRPC code."""
        try:
            if self._detects:
                detect = next(self._detect)
                found = await detect(DetectRequest(images=[jpeg]), timeout=self._patience_s)
                timing = found.results[0].image.timing
            else:
                classify = next(self._classify)
                answer = await classify(ClassifyRequest(images=[jpeg]), timeout=self._patience_s)
                timing = answer.results[0].classification.timing
        except grpc.aio.AioRpcError as failure:
            return Reply(failure.code().name)
        return Reply("OK", timing.batch_size, timing.compute_s)


class Client(Protocol):
    """What sends requests."""

    async def send(self, jpeg: bytes) -> Reply:
        """Send one image, and say what became of it."""
        ...


# Of a port, a path, seconds of patience and channels.
Clients = Mapping[str, Callable[[int, str, float, int], Client]]
CLIENTS: Clients = {"http": HttpClient, "grpc": GrpcClient}


@dataclass(frozen=True)
class Answer:
    """One request: when it was due, when it was answered, and how."""

    due: float
    finished: float
    reply: Reply


class Load:
    """Requests sent by one run, and their answers.

    Args:
        send: sends one image.
        jpegs: sent in turn.
        ask_again: how often a client that left or was refused asks again, at once.
    """

    def __init__(
        self, send: Callable[[bytes], Awaitable[Reply]], jpegs: list[bytes], ask_again: int = 0
    ) -> None:
        self._request = send
        self._jpegs = itertools.cycle(jpegs)
        self._ask_again = ask_again
        self.answers: list[Answer] = []

    async def closed_loop(self, concurrency: int, end: float) -> None:
        """Keep `concurrency` requests in flight until `end`."""

        async def caller() -> None:
            while (due := time.perf_counter()) < end:
                await self._send(due, end)

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
                if (early := due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                group.create_task(self._send(due, end))

    async def _send(self, due: float, end: float) -> None:
        for _ in range(1 + self._ask_again):
            reply = await self._request(next(self._jpegs))
            finished = time.perf_counter()
            self.answers.append(Answer(due, finished, reply))
            if reply.status in ANSWERED or finished > end:
                return
            due = finished


async def probe(port: int, every_s: float, end: float) -> list[Answer]:
    """Ask for the health like a kubelet: one request after the other, each with a connection."""
    client, answers = HttpClient(port, "/health/ready"), []
    while (due := time.perf_counter()) < end:
        reply = await client.send(b"")
        answers.append(Answer(due, time.perf_counter(), reply))
        client.close()
        await asyncio.sleep(every_s)
    return answers


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds that each process of a server has used so far, with its threads.

    Args:
        pid: of a server of one process, or of the supervisor of several.

    Returns:
        Seconds by name; a server of one process is called `server`.
    """
    children = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        *command, birth, _ = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        if "child" in command:
            children[Birth.read(birth).name] = _cpu_s(int(child))
    return {"supervisor" if children else "server": _cpu_s(pid), **children}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summarize(answers: list[Answer], start: float, end: float) -> Row:
    """Figures of the window: throughput of answers in it, latency of requests due in it.

    Answers come in batches, so a window with fixed ends would hold one more or one less by
    chance. Throughput therefore counts from the last answer before the window to the last in it.
    """
    answered = [a for a in answers if a.reply.ok and start <= a.finished < end]
    began = max((a.finished for a in answers if a.finished < start), default=start)
    seconds = max((a.finished for a in answered), default=end) - began
    due = [a for a in answers if start <= a.due < end]
    ok = [1e3 * (a.finished - a.due) for a in due if a.reply.ok]
    return {
        "images_per_s": len(answered) / seconds,
        "engine_busy": sum(a.reply.compute_s / a.reply.batch_size for a in answered) / seconds,
        "images_by_batch_size": dict(Counter(a.reply.batch_size for a in answered)),
        "requests": len(due),
        **{f"{key}_ms": latency for key, latency in percentiles(ok).items()},
        **count_by_status(due, end - start),
    }


def count_by_status(due: list[Answer], seconds: float) -> Row:
    """Counts, rates and latencies of requests that were due in so many seconds."""
    latencies_ms: dict[str, list[float]] = {}
    for answer in due:
        of_status = latencies_ms.setdefault(answer.reply.status, [])
        of_status.append(1e3 * (answer.finished - answer.due))
    statuses = {status: len(latencies) for status, latencies in latencies_ms.items()}
    return {
        "requests_per_s": len(due) / seconds,
        "answered_per_s": sum(statuses.get(status, 0) for status in ANSWERED) / seconds,
        "statuses": statuses,
        "latency_ms": {status: percentiles(of) for status, of in latencies_ms.items()},
    }


def percentiles(latencies: list[float]) -> dict[str, float]:
    """Of latencies by name; none of nothing."""
    if not latencies:
        return {}
    return {f"p{rank}": float(np.percentile(latencies, rank)) for rank in (50, 90, 99)}


async def run(chosen: Namespace, clients: Clients) -> Row:
    """Send the load that the options describe and return its figures."""
    jpegs = [make_jpeg(chosen.height, chosen.width, seed=seed) for seed in range(PICTURES)]
    client = clients[chosen.protocol](chosen.port, chosen.path, chosen.leave_after, chosen.channels)
    load = Load(client.send, jpegs, chosen.ask_again)
    start = time.perf_counter() + chosen.warmup
    end = start + chosen.seconds

    async def cpu_in_window() -> tuple[float, Row]:
        await asyncio.sleep(start - time.perf_counter())
        client, server = time.process_time(), cpu_s(chosen.server_pid)
        await asyncio.sleep(end - time.perf_counter())
        used = {name: total - server[name] for name, total in cpu_s(chosen.server_pid).items()}
        return time.process_time() - client, used

    async with asyncio.TaskGroup() as group:
        cpu = group.create_task(cpu_in_window())
        if chosen.probe_every:
            probes = group.create_task(probe(chosen.port, chosen.probe_every, end))
        if chosen.rate:
            await load.open_loop(chosen.rate, end)
        else:
            await load.closed_loop(chosen.concurrency, end)
    client_cpu_s, by_process = cpu.result()
    figures = summarize(load.answers, start, end) | {
        "client_cpu_s": client_cpu_s,
        "server_cpu_s": sum(by_process.values()),
        "cpu_s_by_process": by_process,
        "jpeg_bytes": round(float(np.mean([len(jpeg) for jpeg in jpegs]))),
    }
    if chosen.probe_every:
        in_window = [answer for answer in probes.result() if start <= answer.due]
        figures["probes"] = count_by_status(in_window, chosen.seconds)
    return figures


def main(module: str = "bench.load", clients: Clients = CLIENTS) -> None:
    """Print the figures of one run as JSON.

    With a `rate` of arrivals a second the loop is open, else `concurrency` requests are in flight.
    Several `channels` are for gRPC alone. All times are seconds; 0 between probes sends none. A
    `core` of 0 or more is the only one used.
    """
    chosen = options(
        module,
        f"{__doc__}\n{main.__doc__}",
        {"protocol": clients},
        protocol="http",
        path="/v1/classify",
        port=0,
        server_pid=0,
        channels=1,
        concurrency=1,
        rate=0.0,
        seconds=10.0,
        warmup=2.0,
        leave_after=PATIENCE_S,
        ask_again=0,
        probe_every=0.0,
        core=-1,
        height=256,
        width=256,
    )
    if chosen.core >= 0:
        os.sched_setaffinity(0, {chosen.core})
    # gRPC has a loop of its own kind.
    begin = uvloop.run if chosen.protocol == "http" else asyncio.run
    print(json.dumps(begin(run(chosen, clients))))


if __name__ == "__main__":
    main()
