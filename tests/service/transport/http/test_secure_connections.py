"""The end of a connection over TLS, in a server of one answer whose kernel keeps little for it."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time

import pytest
import uvloop
from prometheus_client import CollectorRegistry

from service.http_server import HttpServer
from service.metrics.replica import Metrics
from service.security.certificates import read_certificates
from service.security.reloading import Reloading
from service.security.security import Tls
from service.settings.security import Security
from service.settings.server import Server
from service.transport.http.connections.held import Connections
from service.transport.http.connections.over_tls import over_tls
from tests.certificates import Authority

ANSWER = bytes(range(256)) * 2048
LENGTH = [(b"content-length", str(len(ANSWER)).encode())]
SHORT_S = 0.6
GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def tls_of(authority, metrics):
    pair = authority.issue("server")
    settings = Security(tls_certificate=pair.certificate, tls_key=pair.key)

    def read():
        return read_certificates(settings)

    return Tls(False, Reloading("certificates", [], read, lambda _: None, metrics))


@pytest.fixture(scope="module")
def served(authority):
    """The port and the metrics of the server."""
    metrics = Metrics(CollectorRegistry())
    tls = tls_of(authority, metrics)
    limits = Server(write_timeout_s=SHORT_S, header_timeout_s=SHORT_S)
    connections = Connections(limits, most=8, reserve=2, port="http", metrics=metrics)

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": LENGTH})
        await send({"type": "http.response.body", "body": ANSWER})

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        server = HttpServer(app, connections, 5, over_tls(tls))

        def serve():
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(server.serve(sockets=[listener]))

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], metrics
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(authority, served):
    """A connection that is not read unless the test does."""
    context = ssl.create_default_context(cafile=authority.certificate)
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        plain.settimeout(60)
        plain.connect(("127.0.0.1", served[0]))
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            yield secure


def is_alone(served) -> bool:
    end = time.monotonic() + 30
    while served[1].registry.get_sample_value("dat_connections", {"port": "http"}):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def cut(served):
    labels = {"port": "http", "reason": "write_timeout"}
    return served[1].registry.get_sample_value("dat_connections_cut_total", labels)


def test_the_last_answer_is_read_to_its_end_however_slowly(served, client):
    before = cut(served)
    client.sendall(GET)
    read, began = bytearray(), time.monotonic()
    while piece := client.recv(16384):
        read += piece
        due = began + 3 * SHORT_S * len(read) / len(ANSWER)
        time.sleep(max(0.0, due - time.monotonic()))
    head, _, body = bytes(read).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert body == ANSWER
    # The client says nothing of the end and does not close; its place is free all the same.
    assert is_alone(served)
    assert cut(served) == before


def test_a_client_that_reads_nothing_of_its_last_answer_is_cut(served, client):
    before = cut(served)
    client.sendall(GET)
    assert client.recv(12) == b"HTTP/1.1 200"
    assert is_alone(served)
    assert cut(served) == before + 1
    read = 0
    with contextlib.suppress(OSError):
        while piece := client.recv(65536):
            read += len(piece)
    assert read < len(ANSWER)


def test_a_connection_that_is_cut_as_its_handshake_ends_is_counted_once(authority):
    """As it may be in a crowd: the end of the handshake is read before the cut takes effect."""
    metrics = Metrics(CollectorRegistry())
    connections = Connections(Server(), most=8, reserve=2, port="http", metrics=metrics)

    async def app(_scope, _receive, _send):
        raise AssertionError("nothing was asked")

    server = HttpServer(app, connections, 5, over_tls(tls_of(authority, metrics)))
    context = ssl.create_default_context(cafile=authority.certificate)

    async def shake(client):
        """All of a handshake but its last message, which is returned."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        secure = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        loop = asyncio.get_running_loop()
        while True:
            try:
                secure.do_handshake()
            except ssl.SSLWantReadError:
                await loop.sock_sendall(client, outgoing.read())
                incoming.write(await loop.sock_recv(client, 65536))
            else:
                return outgoing.read()

    async def cut_some():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            for _ in range(5):
                with socket.create_connection(listener.getsockname()) as client:
                    client.setblocking(False)
                    last = await shake(client)
                    (connection,) = connections.connections
                    connections.cut(connection, "evicted")
                    client.send(last)
                    while connections.connections:
                        await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # what is told late is told by now
            server.should_exit = True
            await serving

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(cut_some())
    assert metrics.registry.get_sample_value("dat_connections", {"port": "http"}) == 0
