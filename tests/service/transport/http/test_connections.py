"""What strangers send to the HTTP ports, byte by byte, over real sockets."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.command_errors import StartupError
from service.ports import open_ports
from service.settings.server import Server
from service.transport.http.connections.answers import Answers
from service.transport.unread import UnreadAnswers
from tests.clients import JPEG, eventually, over_http
from tests.server import START_TIMEOUT_S, RunningServer, start_server
from tests.service.commands import command, run
from tests.service.transport.http.fuzz import fuzz

MIB = 1 << 20
PATIENCE_S = 8.0  # tells a connection that hangs from one that is slow on a busy machine
SHORT_S = 1.0
KEEP_ALIVE_S = 2.5
MOST = 24
GET = b"GET /health/ready HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET /health/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\n"
LENGTH = b"Content-Length: 1\r\n"
CODING = b"Transfer-Encoding: chunked\r\n"
CHUNKED = POST + CODING + b"\r\n"
POST_NOWHERE = b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with start_server(
        DAT_SERVER__HOST="::",
        DAT_SERVER__HEADER_TIMEOUT_S=SHORT_S,
        DAT_SERVER__BODY_TIMEOUT_S=SHORT_S,
        DAT_SERVER__WRITE_TIMEOUT_S=SHORT_S,
        DAT_SERVER__KEEP_ALIVE_S=KEEP_ALIVE_S,
        DAT_SERVER__MAX_CONNECTIONS=MOST,
        DAT_BATCHING__MAX_BATCH=1,
    ) as running:
        yield running


@dataclass(frozen=True)
class Reply:
    """An answer as it came over a connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        error = json.loads(self.body)["error"]
        assert error["message"]
        assert error["request_id"] == self.headers["x-request-id"]
        return str(error["code"])


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").removesuffix("/metrics").rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    read = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            read += data
    return read


def replies(raw: bytes, head: bool = False) -> Iterator[Reply]:
    while raw:
        top, _, rest = raw.partition(b"\r\n\r\n")
        line, *lines = top.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines)}
        size = 0 if head else int(headers.get("content-length", 0))
        assert len(rest) >= size
        yield Reply(int(line.split()[1]), headers, rest[:size])
        raw = rest[size:]


def ask(server: RunningServer, *pieces: bytes, head: bool = False) -> list[Reply]:
    """Send pieces one after the other, and read until the server closes."""
    with connect(server.http_url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        return list(replies(read_all(connection), head))


def is_ready(server: RunningServer) -> bool:
    return [reply.status for reply in ask(server, CLOSE)] == [200]


def cut(server: RunningServer, reason: str, port: str = "http") -> float:
    return server.metrics()[f"dat_connections_cut_total,port={port},reason={reason}"]


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"garbage\r\n\r\n", 400, "invalid_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400, "invalid_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_request"),
        (b"GET /health/ready\r\n\r\n", 400, "invalid_request"),
        (b"GET /health/ready HTTP/2.0\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: [::::]\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "invalid_request"),
        (POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na", 400, "invalid_request"),
        (POST + b"Content-Length: 1, 1\r\n\r\na", 400, "invalid_request"),
        (POST + b"Content-Length: -1\r\n\r\na", 400, "invalid_request"),
        (POST + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\na", 400, "invalid_request"),
        (
            POST + LENGTH + CODING + b"\r\na",
            400,
            "invalid_request",
        ),
        (
            POST + CODING + LENGTH + b"\r\na",
            400,
            "invalid_request",
        ),
        (POST + b"Transfer-Encoding: gzip\r\n\r\na", 400, "invalid_request"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, "invalid_request"),
        (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400, "invalid_request"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "invalid_request"),
        (CHUNKED + b"x\r\n", 400, "invalid_request"),
        (CHUNKED + b"f" * 17 + b"\r\n", 400, "invalid_request"),
        (CHUNKED + b"1\r\nabc\r\n", 400, "invalid_request"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "url_too_long"),
        (GET[:-2] + b"X: " + b"a" * 17_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET[:-2] + (b"X: " + b"a" * 9000 + b"\r\n") * 9 + b"\r\n", 431, "headers_too_large"),
        (GET[:-2] + b"X: a\r\n" * 101 + b"\r\n", 431, "headers_too_large"),
    ],
    ids=lambda value: repr(value[-40:]) if isinstance(value, bytes) else "",
)
def test_what_is_no_good_request_is_refused_in_the_form_of_all_errors(
    server, request_, status, code
):
    (reply,) = ask(server, request_)
    assert (reply.status, reply.code) == (status, code)
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["connection"] == "close"


@pytest.mark.parametrize(
    "request_",
    [
        CLOSE,
        b"GET /health/ready HTTP/1.0\r\n\r\n",
        b"\r\n\r\n" + CLOSE,
        CLOSE.replace(b"Host: a", b"Host: a_b.c:80"),
        CLOSE.replace(b"Host: a", b"Host: [::1]:8000"),
        CLOSE.replace(b"Host: a", b"Host:"),
        CLOSE.replace(b"GET /", b"GET http://a/"),
        CLOSE[:-2] + b"X: " + b"a" * 8000 + b"\r\n\r\n",
        CLOSE[:-2] + b"X: a\r\n" * 90 + b"\r\n",
    ],
)
def test_unusual_but_good_requests_are_answered(server, request_):
    assert [reply.status for reply in ask(server, request_)] == [200]


def test_answers_of_the_protocol_are_counted(server):
    before = server.metrics().get("dat_responses_total,code=431,protocol=http", 0)
    for _ in range(3):
        ask(server, GET[:-2] + b"X: a\r\n" * 101 + b"\r\n")
    assert server.metrics()["dat_responses_total,code=431,protocol=http"] == before + 3


def test_requests_before_a_bad_one_are_answered_first_and_in_order(server):
    first, second, third = ask(server, GET + GET + b"garbage\r\n\r\n")
    assert [first.status, second.status, third.status] == [200, 200, 400]
    assert third.code == "invalid_request"


def test_the_answer_to_head_comes_before_that_to_a_bad_request_behind_it(server):
    with connect(server.http_url) as connection:
        connection.sendall(GET.replace(b"GET", b"HEAD") + b"garbage\r\n\r\n")
        head, _, rest = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    (refused,) = replies(rest)
    assert (refused.status, refused.code) == (400, "invalid_request")


def test_a_client_of_http_1_0_is_not_told_to_continue(server):
    post = POST.replace(b"HTTP/1.1", b"HTTP/1.0")
    length = b"Content-Length: %d\r\n" % len(JPEG)
    (reply,) = ask(server, post + length + b"Expect: 100-continue\r\n\r\n" + JPEG)
    assert reply.status == 200


def test_a_flood_of_pipelined_requests_is_bounded(server):
    answered = ask(server, GET * 5000)
    assert 64 < len(answered) < 1000
    assert {reply.status for reply in answered[:-1]} == {200}
    assert (answered[-1].status, answered[-1].code) == (429, "overloaded")


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (b"GET /", b"a" * 4096, 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 4096, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: a\r\n" * 512, 431),
        (b"", b"\r\n" * 2048, 431),
        (CHUNKED + b"1;", b"a" * 4096, 400),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"X: a\r\n" * 512, 400),
        (CHUNKED, (b"1;" + b"a" * 500 + b"\r\nb\r\n") * 8, 400),
    ],
    ids=["url", "header", "headers", "empty lines", "extension", "trailers", "extensions"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_never_ends_is_refused_while_it_comes(server, start, more, status):
    memory = Path(f"/proc/{server.process.pid}/statm")
    before = int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    sent = 0
    with connect(server.http_url) as connection:
        connection.sendall(start)
        received = b""
        connection.setblocking(False)
        while not received and sent < 64 * MIB:
            with contextlib.suppress(BlockingIOError):
                sent += connection.send(more)
            with contextlib.suppress(BlockingIOError):
                received += connection.recv(65536)
        connection.setblocking(True)
        connection.settimeout(PATIENCE_S)
        connection.shutdown(socket.SHUT_WR)
        (reply,) = replies(received + read_all(connection))
    assert reply.status == status
    assert sent < 16 * MIB  # what the kernel holds, and what is read before the answer is
    after = int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert after - before < 16 * MIB


def test_a_header_of_64_mib_gets_its_answer(server):
    (reply,) = ask(server, GET[:-2] + b"X: " + b"a" * 64 * MIB + b"\r\n\r\n")
    assert (reply.status, reply.code) == (431, "headers_too_large")


def test_trailers_are_not_headers(server):
    body = b"%x\r\n%s\r\n0\r\nX-Request-Id: from-the-trailer\r\n\r\n" % (len(JPEG), JPEG)
    first, _ = ask(server, CHUNKED + body, CLOSE)
    assert first.status == 200
    assert first.headers["x-request-id"] != "from-the-trailer"


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAMAAABk\r\n"
SMALL = b"no image, but these bytes"
BODIES = {
    "length": b"Content-Length: %d\r\n\r\n" % len(SMALL) + SMALL,
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(SMALL), SMALL),
}


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_offer_to_upgrade_is_passed_over(server, protocol, body):
    """However the request is cut into segments; the next one on the connection is read too."""
    whole = POST.replace(b"image/jpeg", b"text/plain") + OFFER % protocol + body
    expected = [415, 200, 200]
    assert [reply.status for reply in ask(server, whole + GET + CLOSE)] == expected
    step = 1 if protocol == b"h2c" else 17
    with connect(server.http_url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answered = b""
        for number, split in enumerate(range(1, len(whole), step)):
            connection.sendall(whole[:split])
            time.sleep(0.001)
            connection.sendall(whole[split:])
            while answered.count(b"HTTP/1.1 ") < number - 32:  # only so many may wait for answers
                answered += connection.recv(1 << 16)
        connection.sendall(CLOSE)
        found = [reply.status for reply in replies(answered + read_all(connection))]
    assert found == [415] * len(range(1, len(whole), step)) + [200]


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        (b"X: a\r\n" * 101, 431, "more than 100 headers"),
        (b"Host: b\r\n", 400, "one Host header"),
        (b"Transfer-Encoding: gzip\r\n", 400, "transfer coding"),
    ],
    ids=["headers", "hosts", "coding"],
)
def test_a_bad_request_with_an_offer_is_refused_for_what_is_bad(server, wrong, status, message):
    (reply,) = ask(server, POST + OFFER % b"h2c" + wrong + b"\r\n")
    assert reply.status == status
    assert message in json.loads(reply.body)["error"]["message"]


async def test_an_upload_with_an_offer_is_classified(server):
    plain = (await over_http(server, [JPEG])).results[0].predictions
    length = b"Content-Length: %d\r\n\r\n" % len(JPEG)
    offered, _ = ask(server, POST + OFFER % b"h2c" + length, JPEG[:1000], JPEG[1000:], CLOSE)
    (result,) = json.loads(offered.body)["results"]
    found = [(each["label"], each["index"]) for each in result["predictions"]]
    assert found == [prediction[:2] for prediction in plain]


@pytest.mark.parametrize(
    ("start", "more", "reason"),
    [
        (b"GET / HTTP/1.1\r\nX: ", b"a", "header_timeout"),
        (POST + b"Content-Length: 1000000\r\n\r\n", b"a", "body_timeout"),
        pytest.param(CHUNKED, b"1\r\na\r\n", "body_timeout", marks=pytest.mark.slow),
        pytest.param(POST_NOWHERE, b"a", None, marks=pytest.mark.slow),
    ],
    ids=["head", "body", "chunks", "body after its answer"],
)
def test_a_client_that_dribbles_is_cut(server, start, more, reason):
    before = cut(server, reason or "body_timeout")
    with connect(server.http_url) as connection:
        connection.sendall(start)
        begin = time.monotonic()
        connection.settimeout(0.1)
        received = b""
        while time.monotonic() < begin + PATIENCE_S:
            with contextlib.suppress(TimeoutError):
                data = connection.recv(65536)
                received += data
                if not data:
                    break
            connection.sendall(more)
        assert time.monotonic() < begin + PATIENCE_S
    (reply,) = replies(received)
    expected = (408, "request_timeout") if reason else (404, "not_found")
    assert (reply.status, reply.code) == expected
    assert cut(server, reason or "body_timeout") == before + 1


def test_a_slow_upload_that_comes_on_is_answered(server):
    with connect(server.http_url) as connection:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(JPEG))
        step = len(JPEG) // 6
        assert step > 1024
        for start in range(0, len(JPEG), step):
            connection.sendall(JPEG[start : start + step])
            time.sleep(SHORT_S / 3)
        connection.sendall(CLOSE)
        assert [reply.status for reply in replies(read_all(connection))] == [200, 200]


def test_silent_and_idle_connections_end_each_in_its_time(server):
    with connect(server.http_url) as silent, connect(server.http_url) as idle:
        begin = time.monotonic()
        idle.sendall(GET)
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")
        assert read_all(silent) == b""
        assert time.monotonic() < begin + KEEP_ALIVE_S
        idle.sendall(GET)
        begin = time.monotonic()
        assert [reply.status for reply in replies(read_all(idle))] == [200]
        assert KEEP_ALIVE_S * 0.9 < time.monotonic() - begin < KEEP_ALIVE_S + PATIENCE_S


@contextlib.contextmanager
def stuck(url: str, path: bytes = b"/openapi.json") -> Iterator[None]:
    """A connection whose client asks for more than the kernel holds, and reads nothing."""

    def unsent() -> int:
        """Of all connections to the port, as the kernel knows them."""
        port = int(url.removesuffix("/metrics").rpartition(":")[2])
        lines = [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
        return sum(
            int(line[4].partition(":")[0], 16)
            for line in lines
            if line[1].endswith(f":{port:04X}") and line[3] == "01"
        )

    with connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        seen = [0]
        # Where nothing changes once, the server may only not have had its turn.
        with contextlib.suppress(ConnectionError):  # cut already
            while not seen[-1] or len(set(seen[-3:])) > 1:
                connection.sendall(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path * 40)
                time.sleep(0.2)
                seen.append(unsent())
        yield


def test_a_client_that_reads_nothing_is_cut(server):
    before = cut(server, "write_timeout")
    with stuck(server.http_url):
        wait_until(lambda: cut(server, "write_timeout") == before + 1)


def test_a_request_whose_client_has_left_is_not_begun(server):
    """As they come in crowds that wait for no answer, faster than they are read."""
    upload = POST + b"Content-Length: %d\r\n\r\n" % len(JPEG) + JPEG
    gone, answers = cut(server, "left"), server.metrics()
    server.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(MOST):
            with connect(server.http_url) as connection:
                connection.sendall(upload * 2)
        with connect(server.http_url) as half_closed:
            half_closed.sendall(GET)
            half_closed.shutdown(socket.SHUT_WR)
            server.process.send_signal(signal.SIGCONT)
            # Others than uploads are answered at once, and whoever only listens hears it.
            assert b"200 OK" in read_all(half_closed)
    finally:
        server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: cut(server, "left") == gone + MOST)
    again = server.metrics()
    for name in (name for name in again if name.startswith("dat_requests_total")):
        assert again[name] == answers[name]
    assert is_ready(server)


def test_requests_that_are_read_too_late_to_be_answered_are_refused(server):
    body = b"Content-Length: %d\r\n\r\n" % len(JPEG) + JPEG
    upload = POST.replace(b"/classify", b"/classify?timeout=0.5") + body
    with contextlib.ExitStack() as stack:
        server.process.send_signal(signal.SIGSTOP)
        try:
            callers = [stack.enter_context(connect(server.http_url)) for _ in range(8)]
            for connection in callers:
                connection.sendall(upload)
            time.sleep(1)
        finally:
            server.process.send_signal(signal.SIGCONT)
        for connection in callers:
            assert b" 429 " in connection.recv(4096)
    time.sleep(0.3)
    with connect(server.http_url) as connection:
        connection.sendall(upload.replace(b"0.5", b"9.5"))
        assert b" 200 " in connection.recv(4096)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("sent", "count"), [(b"", 200), (GET, 60), (b"GET / HT", 1000)], ids=["silent", "idle", "half"]
)
def test_a_crowd_of_connections_leaves_room_for_probes(server, sent, count):
    with contextlib.ExitStack() as crowd:
        for _ in range(count):
            connection = crowd.enter_context(connect(server.http_url))
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
        assert is_ready(server)
        assert server.metrics()["dat_connections,port=http"] <= MOST + 8 + 1
        assert not os.listdir(f"/proc/{server.process.pid}/fd")[100:]
    wait_until(lambda: server.metrics()["dat_connections,port=http"] == 0)


def test_where_nobody_gives_way_others_than_probes_are_told_to_come_back(server):
    uploading = POST + b"Content-Length: 1000000\r\n\r\n"
    with contextlib.ExitStack() as crowd:
        for _ in range(MOST):
            connection = crowd.enter_context(connect(server.http_url))
            connection.sendall(uploading + bytes(2000))
        wait_until(lambda: server.metrics()["dat_connections,port=http"] == MOST)
        (refused,) = ask(server, b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (refused.status, refused.code) == (503, "too_many_connections")
        assert int(refused.headers["retry-after"]) > 0
        (probe,) = ask(server, GET)
        assert (probe.status, probe.headers["connection"]) == (200, "close")
    wait_until(lambda: server.metrics()["dat_connections,port=http"] == 0)
    assert [reply.status for reply in ask(server, GET, CLOSE)] == [200, 200]


@pytest.mark.slow
def test_slow_scrapers_make_no_threads_and_do_not_stop_a_good_one(server):
    threads = Path(f"/proc/{server.process.pid}/task")
    before = len(list(threads.iterdir()))
    with contextlib.ExitStack() as crowd:
        for _ in range(200):
            crowd.enter_context(connect(server.metrics_url)).sendall(b"GET /metrics HT")
        for _ in range(2):
            crowd.enter_context(stuck(server.metrics_url, b"/metrics"))
        wait_until(lambda: httpx.get(server.metrics_url).status_code == 200)
        assert len(list(threads.iterdir())) <= before


def test_metrics_as_a_scraper_asks_for_them(server):
    with httpx.Client() as client:
        packed = client.get(server.metrics_url, headers={"accept-encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert "dat_connections_cut_total" in packed.text
        plain = client.get(server.metrics_url, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.headers["content-type"].startswith("text/plain")
        accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5"
        open_metrics = client.get(server.metrics_url, headers={"accept": accept})
        assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
        head = client.head(server.metrics_url)
        assert (head.status_code, head.content) == (200, b"")
        wrong = client.get(server.metrics_url, headers={"accept": "text/plain;version=x"})
        assert wrong.status_code == 400


@pytest.mark.parametrize(
    "path", ["/health/live", "/health/ready", "/health/startup", "/v1/models", "/openapi.json"]
)
def test_head_is_get_without_the_body(server, path):
    with httpx.Client(base_url=server.http_url) as client:
        got, head = client.get(path), client.head(path)
    changing = ("date", "x-request-id", "content-length")  # the id is in some bodies
    assert head.content == b""
    assert head.status_code == got.status_code == 200
    for headers in (got.headers, head.headers):
        for name in changing:
            assert headers.pop(name)
    assert head.headers == got.headers


def test_nothing_redirects(server):
    for path in ("/v1/models/", "/health/ready/", "//evil.example/v1/models"):
        (reply,) = ask(server, CLOSE.replace(b"/health/ready", path.encode()))
        assert (reply.status, reply.code) == (404, "not_found")
        assert "location" not in reply.headers


async def test_every_port_of_a_dual_stack_host_speaks_both_protocols(server):
    for host in ("127.0.0.1", "[::1]"):
        for url in (server.http_url + "/health/ready", server.metrics_url):
            async with httpx.AsyncClient() as client:
                assert (await client.get(url.replace("127.0.0.1", host))).status_code == 200
        async with grpc.aio.insecure_channel(
            server.grpc_target.replace("127.0.0.1", host)
        ) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("host", "reached"),
    [("0.0.0.0", {"127.0.0.1"}), ("::1", {"::1"}), ("::", {"127.0.0.1", "::1"})],
)
def test_a_host_opens_its_own_family(host, reached):
    def reaches(address: str, listener: socket.socket) -> bool:
        try:
            socket.create_connection((address, listener.getsockname()[1]), PATIENCE_S).close()
        except OSError:
            return False
        return True

    chosen = Server(host=host, http_port=0, grpc_port=0, metrics_port=0)
    with open_ports(chosen) as (ports, metrics_port):
        for listener in (ports.http, metrics_port):
            assert {a for a in ("127.0.0.1", "::1") if reaches(a, listener)} == reached


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_port_that_is_taken_is_named(name):
    free = {f"{each}_port": 0 for each in ("http", "grpc", "metrics")}
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        chosen = Server(host="127.0.0.1", **free | {f"{name}_port": taken})
        with pytest.raises(StartupError, match=f"(?i){name}.*{taken}"), open_ports(chosen):
            pass


def test_a_port_that_is_taken_ends_the_command_before_torch_is_read():
    with socket.create_server(("127.0.0.1", 0)) as other:
        begin = time.monotonic()
        ended = run(DAT_SERVER__HOST="127.0.0.1", DAT_SERVER__GRPC_PORT=str(other.getsockname()[1]))
    assert time.monotonic() - begin < PATIENCE_S
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert str(other) not in ended.stderr


def test_probes_are_answered_while_the_models_are_read():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    starting = command(DAT_SERVER__HOST="127.0.0.1", DAT_SERVER__HTTP_PORT=port)
    try:
        # It listens from the first moment on, so that who asks too early waits.
        asking = httpx.HTTPTransport(retries=8)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=START_TIMEOUT_S, transport=asking) as client:
            answers = {p: client.get(p) for p in ("/health/live", "/health/ready", "/v1/models")}
    finally:
        starting.kill()
        starting.communicate()
    assert [answer.status_code for answer in answers.values()] == [200, 503, 503]
    assert answers["/v1/models"].json()["error"]["code"] == "not_ready"


def test_strange_bytes_find_nothing(server):
    found = fuzz(server.http_url, server.metrics_url, inputs=300, seed=0)
    assert not found.hung
    assert not [status for status in found.statuses if status >= 500]
    assert is_ready(server)
    wait_until(lambda: server.metrics()["dat_connections,port=http"] == 0)
    assert server.metrics()["dat_requests_in_flight,protocol=http"] == 0


async def test_after_all_that_the_server_is_as_before(server):
    answer = await over_http(server, [JPEG])
    assert answer.error is None
    await eventually(lambda: server.metrics()["dat_connections,port=http"] == 0)
    assert threading.active_count() < 10


def test_clients_that_read_nothing_or_send_nothing_do_not_delay_the_end(server):
    """The last test of the module: it ends the server."""
    with (
        stuck(server.http_url),
        connect(server.http_url) as half,
        connect(server.http_url),
        stuck(server.metrics_url, b"/metrics"),
    ):
        half.sendall(b"GET / HT")
        begin = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - begin < PATIENCE_S


class Written(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, data):
        self.writes.append(data)

    def is_closing(self):
        return False


async def test_the_head_of_an_answer_leaves_with_its_body_and_never_waits_for_it():
    transport = Written()
    answers = Answers(transport, None, UnreadAnswers(0), lambda: transport.writes.append("closed"))
    answers.write(b"HTTP/1.1 200 OK\r\n\r\n")
    answers.write(b"body")
    assert transport.writes == [b"HTTP/1.1 200 OK\r\n\r\nbody"]
    answers.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    answers.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    await asyncio.sleep(0)
    assert transport.writes[1:] == [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ]
    answers.write(b"HTTP/1.1 500 Internal Server Error\r\n\r\n")
    answers.close()
    assert transport.writes[3:] == [b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "closed"]
