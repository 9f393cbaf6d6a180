"""Processes that are killed or stopped, one at a time: who notices, and what callers are told.

What a test asserts is who is answered before what else happens, and how, not how fast: the machine
may be busy.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest

from service.pb import dat_pb2_grpc
from tests.clients import (
    JPEG,
    Answer,
    channel,
    eventually,
    message,
    over_grpc,
    over_http,
    over_stream,
    own_channel,
)
from tests.faults import Faulty, faulty, one_by_one
from tests.processes import children, everybody, is_alive, kill, open_files, stopped
from tests.server import RunningServer
from tests.tallies import assert_no_step_back, counters, device_rows, in_flight, outcomes

TRANSPORTS = (over_http, over_grpc, over_stream)
MODEL = ",model=dat_nano"
WAITING, RUNNING = f"dat_requests_waiting{MODEL}", f"dat_requests_running{MODEL}"
RETRYABLE = {503, "UNAVAILABLE", grpc.StatusCode.UNAVAILABLE.value[0]}
PLACES = 8
# Processes are started anew again and again, which takes long where others want the cores.
pytestmark = pytest.mark.timeout(400)
MANY = {"DAT_SERVER__FRONT_ENDS": 2, "DAT_LIMITS__DEFAULT_TIMEOUT_S": 100}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A server of many processes, of one image at a time; the fault `wait` holds its device."""
    with one_by_one(tmp_path_factory.mktemp("faults"), **MANY) as running:
        yield running


def probe(server: RunningServer, name: str) -> int:
    return httpx.get(f"{server.http_url}/health/{name}", timeout=30).status_code


def ready(server: RunningServer) -> bool:
    return probe(server, "ready") == 200


async def all_ready(server: RunningServer) -> None:
    """Both front ends have seen that there is a worker: connections come to either."""

    def asked() -> bool:
        with suppress(httpx.TransportError):  # of one that was killed
            return len(children(server)) == 3 and all(ready(server) for _ in range(12))
        return False

    await eventually(asked, 90)


def restarts(server: RunningServer, process: str) -> float:
    return sum(
        value
        for name, value in server.metrics().items()
        if name.startswith(f"dat_process_restarts_total,process={process}")
    )


async def the_queue_holds_what_it_should(held: Faulty) -> None:
    """One image on the device, so many in the queue, and not one more, whoever asks.

    Each comes over a connection of its own, so both front ends have some.
    """
    server = held.server
    headers = {"content-type": "image/jpeg"}

    async def over_http_alone() -> str:
        async with httpx.AsyncClient(base_url=server.http_url, timeout=100) as client:
            answer = await client.post("/v1/classify", content=JPEG, headers=headers)
        return {200: "ok", 429: "full"}.get(answer.status_code, str(answer.content))

    async def over_grpc_alone() -> str:
        async with own_channel(server.grpc_target) as connection:
            stub = dat_pb2_grpc.ClassifierServiceStub(connection)
            try:
                await stub.Classify(message([JPEG]))
            except grpc.aio.AioRpcError as error:
                full = error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                return "full" if full else str(error)
            return "ok"

    with held.fault("wait"):
        on_device = [asyncio.create_task(over_http_alone())]
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        asking = [
            asyncio.create_task(ask())
            for _ in range(PLACES + 3)
            for ask in (over_http_alone, over_grpc_alone)
        ]
        refused = len(asking) - PLACES
        await eventually(lambda: sum(one.done() for one in asking) >= refused)
        await eventually(lambda: server.metrics()[WAITING] == PLACES)
        assert Counter(one.result() for one in asking if one.done()) == {"full": refused}
        for ask in (over_http_alone, over_grpc_alone) * 4:
            assert await ask() == "full"
    answers = await asyncio.gather(*on_device, *asking)
    assert Counter(answers) == {"ok": PLACES + 1, "full": refused}
    metrics = server.metrics()
    assert (metrics[WAITING], metrics[RUNNING]) == (0, 0)


async def test_the_bound_of_the_queue_is_that_of_all_front_ends_together(held):
    await all_ready(held.server)
    await the_queue_holds_what_it_should(held)


@pytest.mark.slow
async def test_a_worker_that_is_killed_idle_is_replaced(held):
    server = held.server
    before, restarted = counters(server), restarts(server, "worker-0")
    answer = await over_http(server, [JPEG])
    pid = kill(server, "worker-0")
    await eventually(lambda: restarts(server, "worker-0") == restarted + 1, 90)
    assert not is_alive(pid)
    # What comes meanwhile is told to come back, or waits; then all is as before.
    async with asyncio.timeout(90):
        while (again := await over_http(server, [JPEG])).error is not None:
            assert (again.error, again.status) == ("worker_lost", 503)
            await asyncio.sleep(0.1)
    assert again.results[0].predictions == answer.results[0].predictions
    assert children(server)["worker-0"] != pid
    assert_no_step_back(before, counters(server))
    await all_ready(server)


async def test_a_worker_that_is_killed_in_a_batch_loses_that_batch_alone(held):
    server = held.server
    await all_ready(server)
    before, counted = counters(server), outcomes(server)
    with held.fault("wait"):
        asking = [asyncio.create_task(ask(server, [JPEG])) for ask in TRANSPORTS]
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        asking += [asyncio.create_task(ask(server, [JPEG])) for ask in TRANSPORTS]
        await eventually(lambda: server.metrics()[WAITING] == 5)
        kill(server, "worker-0")
        # As long as the fault is there no replacement can warm up, so this comes before it.
        await eventually(lambda: sum(one.done() for one in asking) == 1)
        await eventually(lambda: not ready(server))
        (lost,) = (one.result() for one in asking if one.done())
        assert lost.error == "worker_lost"
        assert lost.status in RETRYABLE
        assert server.metrics()[WAITING] == 5
        async with httpx.AsyncClient(base_url=server.http_url, timeout=30) as client:
            refused = await client.post("/v1/classify", content=JPEG)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        assert probe(server, "live") == 200
        async with channel(server) as connection:
            stub = dat_pb2_grpc.ClassifierServiceStub(connection)
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Classify(message([JPEG]))
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE
            told = dict(failure.value.trailing_metadata())
            assert int(told["grpc-retry-pushback-ms"]) >= 1
    answers = await asyncio.gather(*asking)
    assert Counter(answer.error for answer in answers) == {None: 5, "worker_lost": 1}
    await eventually(lambda: in_flight(server) == 0)
    after = outcomes(server) - counted
    assert (after["ok"], after["worker_lost"]) == (5, 3)
    assert_no_step_back(before, counters(server))
    await all_ready(server)
    await the_queue_holds_what_it_should(held)


async def post(server: RunningServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request on a connection of its own, sent as far as it goes."""
    host, port = server.http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: %d\r\n\r\n" % len(JPEG)
    )
    await writer.drain()
    return reader, writer


@pytest.mark.faults
async def test_a_front_end_that_is_killed_takes_only_its_own_callers_along(held):
    """Its requests are in every stage: on the device, in the queue, being received."""
    server = held.server
    await all_ready(server)
    before, rows = counters(server), device_rows(server)
    files = open_files(children(server)["worker-0"])
    with held.fault("wait"):
        connections = []
        for sent in (JPEG,) * (PLACES - 1) + (JPEG[:100],) * 6:
            reader, writer = await post(server)
            writer.write(sent)
            connections.append((asyncio.create_task(reader.read(1)), writer))
        await eventually(lambda: server.metrics()[WAITING] == PLACES - 2)
        # Who sends no more may be told so meanwhile; the others wait.
        whole = [reading for reading, _ in connections[: PLACES - 1]]
        assert [reading for reading in whole if reading.done()] == []
        pid = kill(server, "front-end-0")
        await eventually(lambda: restarts(server, "front-end-0") == 1, 90)
        await eventually(lambda: not is_alive(pid))
        await asyncio.sleep(0.5)
        kept = [reading for reading in whole if not reading.done()]
        # Its places are free although the worker had its images.
        assert len(kept) - 1 <= server.metrics()[WAITING] <= len(kept)
    heads = await asyncio.gather(*whole, return_exceptions=True)
    assert sum(head == b"H" for head in heads) == len(kept)
    for reading, writer in connections:
        reading.cancel()
        writer.close()
    assert device_rows(server) - rows <= len(kept) + 1
    await all_ready(server)
    await the_queue_holds_what_it_should(held)
    assert_no_step_back(before, counters(server))
    # The memory of the one that was killed is given back.
    await eventually(lambda: open_files(children(server)["worker-0"]) == files)


@pytest.mark.slow
async def test_while_a_front_end_starts_the_other_one_gets_the_connections(held):
    server = held.server
    await all_ready(server)
    pid = kill(server, "front-end-1")
    await eventually(lambda: not is_alive(pid))
    while not server.log.empty():
        server.log.get()
    async with asyncio.timeout(90):
        told: Counter[str | None] = Counter()
        answered: set[str] = set()
        while "front-end-1" not in answered:
            try:
                answer = await over_http(server, [JPEG])
            except httpx.TransportError:  # it was handed over just when the process ended
                told["cut"] += 1
                continue
            told[answer.error] += 1
            line = await asyncio.to_thread(server.wait_for_event, "request")
            if answer.error is None:
                answered.add(line["process"])
    assert children(server)["front-end-1"] != pid
    # The other one counts as one that hangs where the machine does not let it run for a while.
    assert told.keys() <= {None, "not_ready", "cut"}
    assert told["not_ready"] <= told.total() / 4
    assert told["cut"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["front-end-0", "worker-0", "supervisor"])
async def test_a_process_that_stops_for_a_while_goes_on(held, name):
    server = held.server
    await all_ready(server)
    processes = children(server) | {"supervisor": server.process.pid}
    before = {name: restarts(server, name) for name in processes}
    with stopped(processes[name]):
        asking = [asyncio.create_task(over_http(server, [JPEG])) for _ in range(6)]
        await asyncio.sleep(5)
        if name == "worker-0":
            assert not any(one.done() for one in asking)
    answers = await asyncio.gather(*asking)
    assert {answer.error for answer in answers} == {None}
    assert {name: restarts(server, name) for name in processes} == before
    assert children(server) | {"supervisor": server.process.pid} == processes


@pytest.mark.faults
@pytest.mark.parametrize("name", ["worker-0", "front-end-1"])
async def test_a_process_that_stops_for_ever_is_replaced(held, name):
    server = held.server
    await all_ready(server)
    before = restarts(server, name)
    with stopped(children(server)[name]):
        asking = [asyncio.create_task(over_http(server, [JPEG])) for _ in range(6)]
        await eventually(lambda: restarts(server, name) == before + 1, 90)
    answers = await asyncio.gather(*asking, return_exceptions=True)
    # The images had not reached the device: they waited for the worker that followed. Callers who
    # were with the front end are disconnected.
    told = {one.error if isinstance(one, Answer) else type(one) for one in answers}
    disconnected = {httpx.RemoteProtocolError, httpx.ReadError}
    assert told <= ({None} if name == "worker-0" else {None} | disconnected)
    assert None in told
    hung = f"dat_process_restarts_total,process={name},reason=hung"
    assert server.metrics()[hung] == 1
    await all_ready(server)
    await the_queue_holds_what_it_should(held)


async def expired(server: RunningServer) -> Answer:
    return await over_http(server, [JPEG], timeout=0.3)


async def test_what_expired_or_was_left_in_the_queue_never_reaches_the_device(held):
    """Nor does what was left while its image still waited for its turn to be decoded."""
    server = held.server
    await all_ready(server)
    rows, counted = device_rows(server), outcomes(server)
    with held.fault("wait"):
        first = asyncio.create_task(over_grpc(server, [JPEG]))
        await eventually(lambda: server.metrics()[RUNNING] == 1)
        async with own_channel(server.grpc_target) as connection:
            stub = dat_pb2_grpc.ClassifierServiceStub(connection)
            calls: list[Any] = [stub.Classify(message([JPEG])) for _ in range(3)]
            calls += [asyncio.create_task(over_http(server, [JPEG])) for _ in range(3)]
            stay = asyncio.create_task(over_stream(server, [JPEG]))
            await eventually(lambda: server.metrics()[WAITING] == 7)
            for call in calls:
                call.cancel()
            await eventually(lambda: server.metrics()[WAITING] == 1)
        late = await asyncio.gather(*(expired(server) for _ in range(3)))
        assert {answer.error for answer in late} <= {"deadline_exceeded", "overloaded"}
        await eventually(lambda: server.metrics()[WAITING] == 1)
    assert (await first).error is None
    assert (await stay).error is None
    assert device_rows(server) - rows == 2
    await eventually(lambda: in_flight(server) == 0)
    after = outcomes(server) - counted
    assert after["ok"] == 2
    assert sum(after.values()) == 2 + 6 + 3


@pytest.mark.faults
async def test_faults_of_the_device_end_its_process_and_another_one_answers(tmp_path):
    """Work that never comes back, a thread that ends, and a device that is lost."""
    with faulty(tmp_path, **MANY) as running:
        server = running.server
        answer = await over_http(server, [JPEG])
        for number, fault in enumerate(("exit", "lost", "hang"), 1):
            with running.fault(fault):
                lost = await asyncio.gather(*(ask(server, [JPEG]) for ask in TRANSPORTS))
            for one in lost:
                assert one.error in ("engine_unavailable", "worker_lost")
                assert one.status in RETRYABLE
            await eventually(lambda n=number: restarts(server, "worker-0") >= n, 90)
            await all_ready(server)
            again = await over_http(server, [JPEG])
            assert again.results[0].predictions == answer.results[0].predictions
        # Several may have ended in a row: a fault is there until its request is answered.
        await eventually(lambda: probe(server, "live") == 200, 90)
        reasons = {
            name.split("reason=")[1]
            for name, value in server.metrics().items()
            if name.startswith("dat_process_restarts_total,process=worker-0") and value
        }
        assert "device_lost" in reasons


@pytest.mark.faults
async def test_a_worker_that_dies_again_and_again_takes_liveness(tmp_path):
    """Also while it warms up, in which it is killed here."""
    with faulty(tmp_path, **MANY) as running:
        server = running.server
        # Warming up takes until the fault goes away.
        with running.fault("wait"):
            waiting = asyncio.create_task(over_http(server, [JPEG]))
            await eventually(lambda: server.metrics()[RUNNING] == 1)
            killed = set()
            async with asyncio.timeout(100):
                while len(killed) < 5:
                    pid = children(server).get("worker-0")
                    if pid is not None and pid not in killed:
                        os.kill(pid, signal.SIGKILL)
                        killed.add(pid)
                    await asyncio.sleep(0.02)
            await eventually(lambda: restarts(server, "worker-0") == 5)
            lost = await waiting
            assert (lost.error, lost.status) == ("worker_lost", 503)
            assert probe(server, "ready") == 503
            await eventually(lambda: probe(server, "live") == 503)
        # It is tried all the same, and answers if nobody restarts the whole before.
        await all_ready(server)
        assert (await over_http(server, [JPEG])).error is None


async def ended(pids: list[int]) -> None:
    await eventually(lambda: not any(map(is_alive, pids)))


@pytest.mark.slow
async def test_when_the_supervisor_is_killed_everything_ends(tmp_path):
    with one_by_one(tmp_path, **MANY) as running:
        server = running.server
        memory = set(os.listdir("/dev/shm"))
        pids = everybody(server)
        assert len(pids) == 4
        with running.fault("wait"):
            asking = [asyncio.create_task(over_http(server, [JPEG])) for _ in range(3)]
            await eventually(lambda: server.metrics()[RUNNING] == 1)
            os.kill(pids[0], signal.SIGKILL)
            await ended(pids[1:])
        assert all(
            isinstance(one, httpx.TransportError)
            for one in await asyncio.gather(*asking, return_exceptions=True)
        )
        assert set(os.listdir("/dev/shm")) <= memory


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.faults), signal.SIGINT]
)
async def test_a_signal_to_all_processes_drains_as_one_to_the_first(tmp_path, number):
    """As a terminal sends SIGINT to a process group, and systemd SIGTERM to a control group."""
    with one_by_one(tmp_path, **MANY) as running:
        server = running.server
        pids = everybody(server)
        async with own_channel(server.grpc_target) as connection:
            stub = dat_pb2_grpc.ClassifierServiceStub(connection)
            with running.fault("wait"):
                asking: list[Any] = [
                    asyncio.create_task(ask(server, [JPEG])) for ask in TRANSPORTS * 2
                ]
                idle = stub.ClassifyStream()
                await eventually(lambda: server.metrics()[WAITING] == 5)
                for pid in pids:
                    os.kill(pid, number)
                await asyncio.to_thread(server.wait_for_event, "draining")
            await idle.done_writing()
            answers = await asyncio.gather(*asking)
            assert [answer async for answer in idle] == []
        assert {answer.error for answer in answers} == {None}
        assert await asyncio.to_thread(server.process.wait, 60) == 0
        assert not any(map(is_alive, pids))


@pytest.mark.faults
async def test_a_second_signal_ends_everything_at_once(tmp_path):
    with one_by_one(tmp_path, **MANY, DAT_SERVER__DRAIN_DELAY_S=60) as running:
        pids = everybody(running.server)
        running.server.process.terminate()
        running.server.wait_for_event("draining")
        running.server.process.terminate()
        assert running.server.process.wait(60) != 0
        await ended(pids)
