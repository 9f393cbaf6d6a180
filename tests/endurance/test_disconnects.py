"""A thousand callers who leave, in every stage of a request."""

import asyncio
import socket
import struct
from collections import Counter

import pytest

from service.pb import dat_pb2_grpc
from tests.clients import JPEG, channel, eventually, message, over_grpc, over_http
from tests.faults import faulty
from tests.processes import everybody, open_files, threads
from tests.server import RunningServer
from tests.tallies import device_rows, in_flight, outcomes, seen

HEAD = (
    b"POST /v1/classify?explain=points HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
    b"Content-Length: %d\r\n\r\n" % len(JPEG)
)
AT_ONCE = 40
# What each caller sends before it leaves; what waits does so because the device is held.
SENT = {
    "in the head": HEAD[:30],
    "before the body": HEAD,
    "in the body": HEAD + JPEG[:2000],
    "in the queue": HEAD + JPEG,
}


def leave(connection: socket.socket, *, rudely: bool) -> None:
    if rudely:  # RST instead of FIN
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def callers(server: RunningServer, sent: bytes) -> list[socket.socket]:
    host, port = server.http_url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port)), 30) for _ in range(AT_ONCE)]
    for connection in connections:
        connection.sendall(sent)
    return connections


def kept(server: RunningServer) -> Counter[str]:
    """Descriptors and threads of all processes."""
    pids = everybody(server)
    return Counter(files=sum(map(open_files, pids)), threads=sum(map(threads, pids)))


@pytest.mark.timeout(600)
async def test_a_thousand_callers_who_leave_cost_nothing_that_stays(tmp_path, shape, figures):
    with faulty(tmp_path, DAT_ENGINE__HANG_TIMEOUT_S=300, **shape) as running:
        server = running.server
        golden = await over_http(server, [JPEG])
        await asyncio.gather(*(over_http(server, [JPEG], explain="points") for _ in range(40)))
        await asyncio.gather(*(over_grpc(server, [JPEG]) for _ in range(40)))
        await eventually(lambda: in_flight(server) == 0)
        before, rows, counted = kept(server), device_rows(server), outcomes(server)
        left, known = 0, seen(server)
        with running.fault("wait"):
            # Nothing that is sent from here on can be answered before the callers leave.
            first = asyncio.create_task(over_http(server, [JPEG]))
            await eventually(lambda: server.metrics()["dat_requests_running,model=dat_nano"] >= 1)
            for sent in SENT.values():
                for rudely in (False, True) * 2:
                    asked = seen(server)
                    connections = await asyncio.to_thread(callers, server, sent)
                    if sent == SENT["in the queue"]:  # or refused: others did not wait either
                        await eventually(lambda n=asked: seen(server) == n + AT_ONCE)
                    for connection in connections:
                        leave(connection, rudely=rudely)
                    left += AT_ONCE
                    await eventually(lambda: in_flight(server) == 1)
            async with channel(server) as open_channel:
                stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
                for _ in range(4):
                    asked = seen(server)
                    calls = [stub.Classify(message([JPEG])) for _ in range(AT_ONCE)]
                    await eventually(lambda n=asked: seen(server) == n + AT_ONCE)
                    for call in calls:
                        call.cancel()
                    left += AT_ONCE
                    await eventually(lambda: in_flight(server) == 1)
        assert (await first).error is None
        waiting = outcomes(server) - counted
        assert device_rows(server) - rows <= 1 + 8  # what the device had taken already
        assert waiting["ok"] == 1
        # While they are computed, and while their answers are written, which none of them reads.
        for rudely in (False, True) * 3:
            connections = await asyncio.to_thread(callers, server, HEAD + JPEG)
            await asyncio.sleep(0.05 if rudely else 0.5)
            for connection in connections:
                leave(connection, rudely=rudely)
            left += AT_ONCE
        assert left >= 1000
        await eventually(lambda: in_flight(server) == 0, 60)
        metrics = server.metrics()
        for name in ("waiting", "running"):
            assert metrics[f"dat_requests_{name},model=dat_nano"] == 0
        after = outcomes(server) - counted
        figures(left=left, counted=dict(after), computed=device_rows(server) - rows)
        # Each is counted once; some left before anybody saw them.
        assert 1 + 8 * AT_ONCE <= seen(server) - known <= 1 + left
        again = await over_http(server, [JPEG])
        assert again.results[0].predictions == golden.results[0].predictions
        await eventually(lambda: kept(server)["threads"] <= before["threads"] + 4, 60)
        await eventually(lambda: kept(server)["files"] <= before["files"] + 8, 60)
