"""What comes with and behind the last answer of a connection, in a server of one short answer."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from service.errors import Overloaded
from service.http_server import HttpServer
from service.metrics.replica import Metrics
from service.settings.server import Server
from service.transport.http.connections.held import Connections

PATIENCE_S = 30.0
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"


class Serving:
    """The server, in the event loop of the test.

    Attributes:
        free: lets the application answer.
        faults: what the event loop caught.
    """

    def __init__(self, **of_connections: Any) -> None:
        self.free = asyncio.Event()
        self.faults: list[Any] = []
        self.connections = Connections(
            Server(),
            most=8,
            reserve=2,
            port="http",
            metrics=Metrics(CollectorRegistry()),
            **of_connections,
        )
        self.server = HttpServer(self._app, self.connections, int(PATIENCE_S))

    async def _app(self, _scope: Any, _receive: Any, send: Any) -> None:
        await self.free.wait()
        length = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving(**of_connections: Any) -> AsyncIterator[tuple[Serving, tuple[str, int]]]:
    """The server and its address."""
    one = Serving(**of_connections)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: one.faults.append(context))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        running = asyncio.create_task(one.server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield one, address
        finally:
            one.free.set()
            one.server.should_exit = True
            await running


async def test_a_broken_body_behind_the_last_answer_is_thrown_away():
    full = Overloaded("the queue is full", retry_after_s=1.0)
    async with serving(gate=lambda *_: full) as (one, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(CLOSED + b"x\r\n")
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert not one.faults


async def test_nothing_is_read_behind_the_last_refusal_of_a_server_that_leaves():
    full = Overloaded("the queue is full", retry_after_s=1.0)
    async with serving(gate=lambda *_: full) as (one, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        one.connections.draining = True
        writer.write(GET + GET + b"garbage\r\n\r\n")
        answers = await reader.read()
        writer.close()
        assert answers.count(b"HTTP/1.1 ") == 1
        assert not one.faults


async def test_a_server_that_leaves_reads_on_while_a_client_sends_what_was_refused():
    """Or the client would see its connection break before it looks for an answer."""
    full = Overloaded("the queue is full", retry_after_s=1.0)
    async with serving(gate=lambda *_: full) as (one, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        while not one.connections.total_requests:
            await asyncio.sleep(0.01)
        one.server.should_exit = True
        while not one.connections.draining:
            await asyncio.sleep(0.01)
        for _ in range(10):
            writer.write(bytes(100_000))
            await writer.drain()
            await asyncio.sleep(0.01)
        assert (await reader.read()).startswith(b"HTTP/1.1 429 ")
        writer.close()


async def test_a_connection_that_comes_while_the_server_leaves_ends_with_its_answer():
    """As one that was accepted just before, and is heard of just after."""
    async with serving() as (one, address):
        first, first_writer = await asyncio.open_connection(*address)
        first_writer.write(GET)
        while not one.connections.tasks:
            await asyncio.sleep(0.01)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            late, late_writer = await asyncio.open_connection(*listener.getsockname())
            accepted, _ = listener.accept()
        one.server.should_exit = True
        while not one.connections.draining:
            await asyncio.sleep(0.01)
        accepted.setblocking(False)
        await one.server.adopt(accepted)
        late_writer.write(GET)
        one.free.set()
        for reader, writer in ((first, first_writer), (late, late_writer)):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection: close" in head
            assert await reader.read() == b"ok"
            writer.close()
