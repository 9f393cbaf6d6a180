"""The figures of the load generator follow from the answers it recorded."""

import asyncio
import itertools
import time

import pytest

from bench.closed_loop import seconds_per_image
from bench.load import Answer, HttpClient, Load, Reply, count_by_status, summarize


def test_throughput_runs_from_batch_to_batch_and_latency_counts_from_when_it_was_due() -> None:
    answers = [
        Answer(due=0.2, finished=0.7, reply=Reply("200", 1, 0.3)),  # answered before the window
        Answer(due=0.5, finished=1.7, reply=Reply("200", 2, 0.4)),  # due before it
        Answer(due=1.0, finished=1.7, reply=Reply("200", 2, 0.4)),
        Answer(due=2.0, finished=2.1, reply=Reply("429")),
        Answer(due=2.5, finished=3.5, reply=Reply("200", 1, 0.3)),  # answered after it
    ]

    figures = summarize(answers, start=1.0, end=3.0)

    assert figures["images_per_s"] == pytest.approx(2 / (1.7 - 0.7))
    assert figures["engine_busy"] == pytest.approx(0.4)
    assert figures["images_by_batch_size"] == {2: 2}
    assert figures["statuses"] == {"200": 2, "429": 1}
    assert figures["p50_ms"] == pytest.approx(850.0)


def test_the_engine_is_timed_at_the_batch_sizes_of_the_server() -> None:
    timed = {1: 0.06, 4: 0.03}

    assert seconds_per_image({"1": 5}, timed) == pytest.approx(0.06)
    assert seconds_per_image({"1": 2, "4": 4}, timed) == pytest.approx(0.04)
    assert seconds_per_image({"2": 7}, timed) == pytest.approx(0.05)


async def test_a_client_of_http_keeps_its_connection_and_leaves_when_its_patience_ends() -> None:
    """Against a server that answers in two parts, and a second request never."""
    connections = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        for status, body in answers[len(connections) - 1]:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"POST /v1/detect HTTP/1.1\r\n")
            assert await reader.readexactly(4) == b"jpeg"
            answer = f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            writer.write(answer[:-3])
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.write(answer[-3:])
        await reader.read()
        writer.close()

    timing = '{"results": [{"timing": {"batch_size": 2, "compute_s": 0.5}}]}'
    answers = [[(200, timing), (429, "{}")], []]
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(port, "/v1/detect", patience_s=0.3)
        replies = [await client.send(b"jpeg") for _ in range(3)]
        assert replies == [Reply("200", 2, 0.5), Reply("429"), Reply("left")]
        assert len(connections) == 1, "the last was left on the same connection"
        assert await client.send(b"jpeg") == Reply("left")
        assert len(connections) == 2
    assert await client.send(b"jpeg") == Reply("disconnected")


async def test_a_client_that_is_refused_asks_again_until_it_is_answered() -> None:
    statuses = iter(["429", "left", "200", "429", "429", "429"])

    async def send(_: bytes) -> Reply:
        return Reply(next(statuses))

    load = Load(send, [b"jpeg"], ask_again=2)
    end = time.perf_counter() + 60
    await load.open_loop(1e6, time.perf_counter() - 1)
    assert not load.answers
    for _ in range(2):
        await load._send(time.perf_counter(), end)
    asked = [answer.reply.status for answer in load.answers]
    assert asked == ["429", "left", "200", "429", "429", "429"]
    assert all(a.due <= a.finished <= b.due for a, b in itertools.pairwise(load.answers))


def test_requests_are_counted_by_status() -> None:
    replies = [("200", 0.1), ("200", 0.3), ("429", 0.002)]
    due = [Answer(1.0, 1.0 + latency, Reply(status)) for status, latency in replies]
    counted = count_by_status(due, 2.0)
    assert (counted["requests_per_s"], counted["answered_per_s"]) == (1.5, 1.0)
    assert counted["statuses"] == {"200": 2, "429": 1}
    assert counted["latency_ms"]["200"]["p50"] == pytest.approx(200)
    assert counted["latency_ms"]["429"]["p99"] == pytest.approx(2)
