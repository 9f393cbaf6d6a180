"""Mutated requests of HTTP, as bytes over sockets, against a server that must not mind.

    python -m tests.service.transport.http.fuzz --inputs 20000

Starts the server, prints how many inputs got which status, and ends with 1 if one of them was
answered as a fault of the server or not at all, or if the server is not as it was before.
"""

import argparse
import asyncio
import io
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
from PIL import Image

from tests.server import RunningServer, start_server

_AT_ONCE = 10  # fewer than connections to metrics
_PATIENCE_S = 30.0  # a crowded machine is no hang
_TIMES_S = 0.5
_SETTLE_S = 30.0
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n")
_PATHS = [
    "/v1/classify", "/v1/classify?top_k=3", "/v1/classify?top_k=x&top_k=2", "/v1/detect",
    "/v1/detect?score_threshold=2", "/v1/segment?confidence=x", "/v1/models",
    "/v1/models/dat_nano", "/v1/models/%00", "/v1/models/../../etc/passwd", "/health/live",
    "/health/ready", "/health/startup", "/openapi.json", "/docs", "/", "//", "/v1/classify/",
    "/metrics", "*", "http://a/health/live",
    "/v2", "/v2/models/dat_nano", "/v2/models/dat_nano/infer", "/v2/models/%00/infer",
    "/v2/models/dat_nano/versions/1/infer", "/v2/health/ready", "http://a/v2/models/x/infer",
]  # fmt: skip
_METHODS = ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "get"]
_TYPES = [
    "image/jpeg", "application/json", "multipart/form-data; boundary=b", "multipart/form-data",
    "text/plain", "application/octet-stream", "", "application/json; charset=utf-16",
]  # fmt: skip
_HEADERS = [
    b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade\r\nUpgrade: h2c",
    b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Expect: 100-continue", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity",
    b"Content-Length: 5", b"Content-Length: 99999999999", b"Host: b", b"Accept: text/plain;q=x",
    b"X-Request-Id: \x01\x02", b"X: " + b"a" * 20_000, b"X: a\r\n" * 120, b"Content-Encoding: gzip",
    b"Range: bytes=0-", b"Cookie: \xff\xfe", b"Accept-Encoding: gzip;q=0", b"TE: trailers",
    b"Inference-Header-Content-Length: 0", b"Inference-Header-Content-Length: -1",
]  # fmt: skip
_INSERTED = [
    b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b" ", b":", b"\r\n\r\n", b"0\r\n\r\n", b"%", b"%00",
    b"a" * 70_000, b"-1", b"18446744073709551616", b"{", b"[" * 2000, b'"', b"--b", b"--b--",
]  # fmt: skip


@dataclass
class Found:
    """What became of the inputs.

    Attributes:
        statuses: of first answers, and how often.
        unanswered: inputs after which the server closed without an answer.
        left: inputs whose client did not wait.
        hung: numbers of the inputs that neither got an answer nor saw the connection end.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    left: int = 0
    hung: list[int] = field(default_factory=list)


def fuzz(*urls: str, inputs: int, seed: int) -> Found:
    """Send inputs to servers in turn, several at a time.

    Args:
        urls: of the servers; their paths do not matter.
        inputs: how many.
        seed: the same one makes the same inputs.
    """
    return asyncio.run(_fuzz(urls, inputs, seed))


async def _fuzz(urls: tuple[str, ...], inputs: int, seed: int) -> Found:
    found, todo = Found(), iter(range(inputs))

    async def work() -> None:
        for index in todo:
            url = httpx.URL(urls[index % len(urls)])
            if not await _send(url, random.Random(f"{seed}-{index}"), found):
                found.hung.append(index)

    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
    return found


async def _send(url: httpx.URL, chance: random.Random, found: Found) -> bool:
    """Send one input; whether the server did something about it."""
    data = make_input(chance)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(4)))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            writer.write(data[start:end])
            await asyncio.sleep(0)
        match chance.randrange(8):
            case 0:
                writer.write_eof()
            case 1:
                found.left += 1
                writer.transport.abort()
                return True
        return await _wait(reader, found)
    except OSError:  # it has closed already
        found.unanswered += 1
        return True
    finally:
        writer.close()


async def _wait(reader: asyncio.StreamReader, found: Found) -> bool:
    received = b""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while data := await reader.read(65536):
                received += data
                statuses = [int(status) for status in _STATUS.findall(received)]
                final = [status for status in statuses if status >= 200]
                if final:
                    found.statuses[final[0]] += 1
                    return True
    except TimeoutError:
        return False
    found.unanswered += 1
    return True


def make_input(chance: random.Random) -> bytes:
    """A request, or several, in which something is wrong, or nothing."""
    data = b"".join(_request(chance) for _ in range(chance.choice([1, 1, 1, 2, 3])))
    for _ in range(chance.choice([0, 1, 1, 2, 5])):
        data = chance.choice(_MUTATIONS)(data, chance)
    return data


def _request(chance: random.Random) -> bytes:
    method = chance.choice(_METHODS) if chance.random() < 0.3 else chance.choice(["GET", "POST"])
    path = chance.choice(_PATHS)
    version = chance.choice(["1.1", "1.1", "1.1", "1.1", "1.0", "2.0", "0.9"])
    lines = [f"{method} {path} HTTP/{version}".encode(), b"Host: a"]
    lines += chance.sample(_HEADERS, chance.choice([0, 0, 1, 2]))
    if method != "POST":
        return b"\r\n".join([*lines, b"", b""])
    body = chance.choice(_BODIES)
    lines.append(f"Content-Type: {chance.choice(_TYPES)}".encode())
    if chance.random() < 0.3:
        lines.append(b"Transfer-Encoding: chunked")
        size = chance.choice([1, 100, 5000])
        chunks = [body[start : start + size] for start in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    else:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(file, "JPEG")
    return file.getvalue()


_PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n'
_BODIES = [
    b"",
    _jpeg(),
    _jpeg()[:200],
    _PART % _jpeg() + b"--b--\r\n",
    _PART % b"" * 40,
    json.dumps({"image": "AAAA"}).encode(),
    json.dumps({"images": [1] * 1000, "top_k": 3}).encode(),
    b'{"a":' * 500,
    bytes(range(256)),
]


def _flip(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.choice(_INSERTED) + data[at:]


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _drop(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start + chance.randrange(1, 50) :]


def _repeat(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return data[:start] + data[start : start + 100] * chance.randrange(2, 20) + data[start + 100 :]


def _noise(_: bytes, chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, 2000))


_MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    _flip, _flip, _insert, _insert, _cut, _drop, _repeat, _noise
]  # fmt: skip


@dataclass(frozen=True)
class _State:
    """What must be the same before and after."""

    answer: Any
    open_files: int
    threads: int
    gauges: dict[str, float]

    @classmethod
    def of(cls, server: RunningServer) -> "_State":
        process = f"/proc/{server.process.pid}"
        headers = {"content-type": "image/jpeg"}
        answer = httpx.post(f"{server.http_url}/v1/classify", content=_jpeg(), headers=headers)
        names = ("dat_requests_in_flight", "dat_requests_waiting", "dat_requests_running")
        gauges = {
            name: value
            for name, value in server.metrics().items()
            if name.startswith((*names, "dat_request_bytes_in_flight", "dat_connections,"))
        }
        gauges.pop("dat_connections,port=metrics")  # that which asks
        return cls(
            answer.json().get("results", [{}])[0].get("predictions"),
            len(os.listdir(f"{process}/fd")),
            len(os.listdir(f"{process}/task")),
            gauges,
        )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    times = ("HEADER_TIMEOUT_S", "BODY_TIMEOUT_S", "WRITE_TIMEOUT_S", "KEEP_ALIVE_S")
    limits: dict[str, object] = {f"DAT_SERVER__{name}": _TIMES_S for name in times}
    with start_server(("service",), **limits) as server:
        fuzz(server.http_url, server.metrics_url, inputs=200, seed=-1)  # every thread has begun
        time.sleep(4 * _TIMES_S)
        before, start = _State.of(server), time.monotonic()
        found = fuzz(
            server.http_url, server.metrics_url, inputs=arguments.inputs, seed=arguments.seed
        )
        seconds = time.monotonic() - start
        end = time.monotonic() + _SETTLE_S
        while (after := _State.of(server)) != before and time.monotonic() < end:
            time.sleep(1)
        print(f"{arguments.inputs} inputs in {seconds:.0f} s")
        for status, count in sorted(found.statuses.items()):
            print(f"{status}: {count}")
        print(f"closed without an answer: {found.unanswered}; left: {found.left}")
        print(f"hung: {found.hung}")
        print(f"as before: {after == before}", "" if after == before else f"{before} {after}")
        faults = len(found.hung) + sum(n for status, n in found.statuses.items() if status >= 500)
        ended = server.process.poll() is not None
        sys.exit(1 if faults or ended or after != before else 0)


if __name__ == "__main__":
    main()
