"""What callers, probes and metrics see when parts of a server fail.

Every test ends alike: the process lives, or ends as promised; a picture has its answer as before;
nothing is left in the queue or on the device; and everything that was sent is counted once.
"""

import asyncio
import io
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from service.errors import all_errors
from service.leaving import STUCK_EXIT_CODE
from tests.clients import JPEG, Answer, channel, eventually, over_grpc, over_http, over_stream
from tests.faults import SHAPES, Faulty, faulty
from tests.processes import everybody, stopped
from tests.server import ROOT, START_TIMEOUT_S, RunningServer

SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
TRANSPORTS = (over_http, over_grpc, over_stream)
DECODED = "dat_stage_duration_seconds_count,model=dat_nano,stage=decode"
STATUS = {code: (e.http_status, e.grpc_code) for e in all_errors() for code in [e.code]}


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (128, 128), colour).save(file, "PNG")
    return file.getvalue()


RED, GREEN, BLUE, WHITE = map(picture, ("#f00", "#0f0", "#00f", "#fff"))


@pytest.fixture(scope="module", params=SHAPES)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Faulty]:
    with faulty(tmp_path_factory.mktemp("faults"), **SHAPES[request.param]) as running:
        yield running


def outcomes(metrics: dict[str, float]) -> Counter[str]:
    """Images by their code."""
    counted: Counter[str] = Counter()
    for name, value in metrics.items():
        if name.startswith("dat_image_outcomes_total"):
            counted[name.split("code=")[1].split(",")[0]] += int(value)
    return counted


def requests(metrics: dict[str, float]) -> Counter[str]:
    """Requests by their outcome."""
    counted: Counter[str] = Counter()
    for name, value in metrics.items():
        if name.startswith("dat_requests_total"):
            counted[name.split("outcome=")[1].split(",")[0]] += int(value)
    return counted


def failures(server: RunningServer) -> dict[str, float]:
    start, end = "dat_batch_failures_total,cause=", ",model=dat_nano"
    return {
        name.removeprefix(start).removesuffix(end): value
        for name, value in server.metrics().items()
        if name.startswith(start) and value
    }


@contextmanager
def counted_once(server: RunningServer, codes: Counter[str]) -> Iterator[None]:
    """Everything that is sent meanwhile is counted once, and the server is as before."""
    before = server.metrics()
    yield
    after = server.metrics()
    assert outcomes(after) - outcomes(before) == codes
    for gauge in ("waiting", "running"):
        assert after[f"dat_requests_{gauge},model=dat_nano"] == 0
    for protocol in ("http", "grpc", "stream"):
        assert after[f"dat_requests_in_flight,protocol={protocol}"] == 0


async def answers_again(server: RunningServer) -> None:
    deadline = time.monotonic() + 5
    while True:
        answers = await asyncio.gather(*(ask(server, [JPEG]) for ask in TRANSPORTS))
        if all(answer.error is None for answer in answers) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    first, *others = [answer.results[0].predictions for answer in answers]
    for other in others:
        assert [label for label, *_ in other] == [label for label, *_ in first]
    assert {answer.error for answer in answers} == {None}


@pytest.mark.parametrize("ask", TRANSPORTS)
async def test_the_line_of_a_failed_batch_says_what_failed_where_and_whose_images(
    shared: Faulty, ask: Any
) -> None:
    server = shared.server
    answer = await ask(server, [RED])
    assert answer.results[0].error if answer.results else answer.error
    lines: dict[str, Any] = {}
    while not {"batch failed", "request"} <= lines.keys():  # by two processes, or by one
        line = server.log.get(timeout=START_TIMEOUT_S)
        assert line
        lines[line["event"]] = line
    failed = lines["batch failed"]
    assert (failed["model"], failed["device"], failed["bucket"]) == ("dat_nano", "cpu:0", 1)
    assert failed["requests"] == [lines["request"]["request_id"]]


def probes(server: RunningServer) -> tuple[int, ...]:
    with httpx.Client(base_url=server.http_url) as client:
        return tuple(client.get(f"/health/{p}").status_code for p in ("live", "ready"))


async def grpc_health(server: RunningServer) -> set[int]:
    async with channel(server) as open_channel:
        stub = health_pb2_grpc.HealthStub(open_channel)
        names = ("", "dat.v1.ClassifierService", "dat.v1.DetectorService", "dat.v1.ModelService")
        answers = [await stub.Check(health_pb2.HealthCheckRequest(service=n)) for n in names]
    return {answer.status for answer in answers}


async def health_becomes(server: RunningServer, status: int) -> None:
    """Front ends look at the state of the workers a few times in a second."""
    async with asyncio.timeout(30):
        while await grpc_health(server) != {status}:
            await asyncio.sleep(0.05)


def assert_retryable(answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.error == "engine_unavailable"
        assert answer.status in (503, "UNAVAILABLE", grpc.StatusCode.UNAVAILABLE.value[0])


@pytest.mark.parametrize("ask", TRANSPORTS)
async def test_only_the_image_that_fails_its_batch_fails(shared, ask):
    server = shared.server
    sent = [JPEG, JPEG, RED, JPEG, JPEG, JPEG, RED, JPEG]
    with counted_once(server, Counter(ok=6 + 3, engine_failed=2)):
        answer = await ask(server, sent)
        assert [result.error for result in answer.results] == [
            "engine_failed" if image is RED else None for image in sent
        ]
        await answers_again(server)


async def test_strangers_in_a_batch_are_not_hurt_by_each_other(shared):
    server = shared.server
    with counted_once(server, Counter(ok=12 + 3, engine_failed=6)):
        with shared.fault("wait"):  # until all are in the queue
            asking = [
                asyncio.create_task(TRANSPORTS[n % 3](server, [RED if n % 3 == 1 else JPEG]))
                for n in range(18)
            ]
            await eventually(
                lambda: (
                    sum(
                        value
                        for name, value in server.metrics().items()
                        if name.startswith(("dat_requests_waiting", "dat_requests_running"))
                    )
                    == 18
                )
            )
        answers = await asyncio.gather(*asking)
        assert [a.error for a in answers] == [
            "engine_failed" if n % 3 == 1 else None for n in range(18)
        ]
        await answers_again(server)


@pytest.mark.parametrize("ask", TRANSPORTS)
async def test_a_batch_that_does_not_fit_runs_in_parts_and_the_size_is_remembered(shared, ask):
    server = shared.server
    with counted_once(server, Counter(ok=16 + 3)):
        before = failures(server).get("out_of_memory", 0)
        with shared.fault("memory-2"):
            with shared.fault("wait"):  # until all are decoded: what waits leaves together
                decoded = server.metrics()[DECODED]
                asking = asyncio.create_task(ask(server, [JPEG] * 8))
                await eventually(lambda: server.metrics()[DECODED] == decoded + 8)
            first = await asking
            tried = failures(server)["out_of_memory"]
            second = await ask(server, [JPEG] * 8)
            assert failures(server)["out_of_memory"] == tried <= before + 2
        for result in (*first.results, *second.results):
            assert result.error is None
        assert max(result.batch_size for result in second.results) <= 2
        await answers_again(server)


async def test_an_image_that_never_fits_is_its_own_failure(shared):
    server = shared.server
    with counted_once(server, Counter(ok=3 + 3, out_of_memory=1 + 10)):
        answer = await over_http(server, [JPEG, BLUE, JPEG, JPEG])
        assert [r.error for r in answer.results] == [None, "out_of_memory", None, None]
        # However often it comes: a blank image works, so the model is not at fault.
        for ask in (over_http, over_grpc) * 5:
            assert (await ask(server, [BLUE])).status in (500, "INTERNAL")
        assert probes(server) == (200, 200)
        await answers_again(server)


@pytest.mark.parametrize("ask", TRANSPORTS)
async def test_an_answer_that_cannot_be_made_fails_alone(shared, ask):
    server = shared.server
    with counted_once(server, Counter(ok=2 + 3, internal=2)):
        answer = await ask(server, [JPEG, WHITE, JPEG])
        assert [result.error for result in answer.results] == [None, "internal", None]
        assert (await ask(server, [WHITE])).error == "internal"
        await answers_again(server)


async def test_a_request_of_which_every_image_failed_is_not_counted_as_ok(shared):
    server = shared.server
    with counted_once(server, Counter(engine_failed=8, ok=1, invalid_image=3)):
        before = requests(server.metrics())
        await over_http(server, [RED] * 8)
        await over_http(server, [JPEG, b"x"])
        await over_grpc(server, [b"x", b"x"])
        after = requests(server.metrics())
        assert after - before == Counter(server_error=1, ok=1, client_error=1)


async def test_an_error_that_the_device_gets_over_fails_its_batch_alone(shared):
    server = shared.server
    with counted_once(server, Counter(ok=3, engine_failed=1)):
        with shared.fault("hiccup"):
            assert (await over_http(server, [JPEG])).error == "engine_failed"
        assert probes(server) == (200, 200)
        await answers_again(server)


async def test_a_model_that_always_fails_is_out_of_use_until_it_works(shared):
    server = shared.server
    async with asyncio.timeout(60):
        with shared.fault("error"):
            asked = 0
            while probes(server) == (200, 200):
                assert (await over_http(server, [JPEG])).error == "engine_failed"
                asked += 1
                assert asked < 20
            assert probes(server) == (200, 503)
            await eventually(lambda: server.metrics()["dat_model_ready,model=dat_nano"] == 0)
            await health_becomes(server, NOT_SERVING)
            assert_retryable([await ask(server, [JPEG]) for ask in TRANSPORTS])
            assert server.metrics()["dat_model_failing,model=dat_nano"] == 1
        await eventually(lambda: probes(server) == (200, 200), 6)
        await health_becomes(server, SERVING)
        metrics = server.metrics()
        assert metrics["dat_model_ready,model=dat_nano"] == 1
        assert metrics["dat_model_failing,model=dat_nano"] == 0
        with counted_once(server, Counter(ok=3)):
            await answers_again(server)


@pytest.mark.slow
async def test_a_batch_that_is_slow_is_not_taken_for_one_that_hangs(shared):
    server = shared.server
    with counted_once(server, Counter(ok=1 + 3)):
        with shared.fault("wait"):
            slow = asyncio.create_task(over_http(server, [JPEG]))
            await eventually(lambda: server.metrics()["dat_requests_running,model=dat_nano"])
            # Stopped, processes learn nothing of the time that passes.
            with stopped(*everybody(server)):
                await asyncio.sleep(4)
        assert (await slow).error is None
        assert probes(server) == (200, 200)
        await answers_again(server)


async def test_a_device_that_hangs_is_noticed_and_sigterm_ends_the_process(tmp_path):
    with faulty(tmp_path, DAT_BATCHING__MAX_BATCH=1) as running:
        server = running.server
        async with asyncio.timeout(30), channel(server) as open_channel:
            watch = health_pb2_grpc.HealthStub(open_channel).Watch(
                health_pb2.HealthCheckRequest(service="dat.v1.ClassifierService")
            )
            assert (await watch.read()).status == SERVING
            with counted_once(server, Counter(engine_unavailable=9 + 3)):
                asking = [asyncio.create_task(ask(server, [GREEN])) for ask in TRANSPORTS]
                await eventually(lambda: server.metrics()["dat_requests_running,model=dat_nano"])
                asking += [asyncio.create_task(ask(server, [JPEG])) for ask in TRANSPORTS * 2]
                assert_retryable(await asyncio.gather(*asking))
                assert (await watch.read()).status == NOT_SERVING
                assert probes(server) == (503, 503)
                assert await grpc_health(server) == {NOT_SERVING}
                assert server.metrics()["dat_model_ready,model=dat_nano"] == 0
                assert failures(server) == {"hung": 1}
                start = time.monotonic()
                assert_retryable([await ask(server, [JPEG]) for ask in TRANSPORTS])
                assert time.monotonic() - start < 1
        start = time.monotonic()
        assert server.terminate() == STUCK_EXIT_CODE
        assert time.monotonic() - start < 5
        stuck = server.wait_for_event("stuck")
        assert any("engine cpu:0" in thread and "fail" in thread for thread in stuck["threads"])


@pytest.mark.slow
async def test_of_two_devices_the_one_that_is_lost_is_out_and_the_other_goes_on(tmp_path):
    with faulty(tmp_path, DAT_ENGINE__DEVICE="cpu,cpu", DAT_BATCHING__MAX_BATCH=2) as running:
        server = running.server
        with counted_once(server, Counter(ok=30 + 3, engine_unavailable=2 + 3)):
            with running.fault("exit"):
                assert_retryable([await over_grpc(server, [JPEG])])
            assert probes(server) == (503, 200)
            assert await grpc_health(server) == {SERVING}
            assert server.metrics()["dat_model_ready,model=dat_nano"] == 1
            answers = await asyncio.gather(*(ask(server, [JPEG]) for ask in TRANSPORTS * 10))
            assert {answer.error for answer in answers} == {None}
            await answers_again(server)
            with running.fault("lost"):
                assert_retryable([await over_http(server, [JPEG])])
            # The fault is gone; nothing runs on a lost device all the same.
            assert_retryable([await ask(server, [JPEG]) for ask in TRANSPORTS])
            assert probes(server) == (503, 503)
            assert await grpc_health(server) == {NOT_SERVING}
            assert server.metrics()["dat_model_ready,model=dat_nano"] == 0
            assert failures(server) == {"lost": 2}
        assert server.terminate() == 0


@pytest.mark.slow
async def test_sigterm_ends_the_process_in_the_grace_whatever_is_stuck(tmp_path):
    limits = {"DAT_SERVER__DRAIN_GRACE_S": 2, "DAT_ENGINE__HANG_TIMEOUT_S": 60}
    with faulty(tmp_path, **limits) as running:
        server = running.server
        asking = [asyncio.create_task(ask(server, [GREEN])) for ask in TRANSPORTS]
        await eventually(lambda: server.metrics()["dat_requests_running,model=dat_nano"])
        (tmp_path / "decode").touch()
        asking.append(asyncio.create_task(over_http(server, [JPEG])))
        await asyncio.sleep(0.2)
        start = time.monotonic()
        assert await asyncio.to_thread(server.terminate) == STUCK_EXIT_CODE
        assert time.monotonic() - start < 2 + 4
        *hung, _ = await asyncio.gather(*asking, return_exceptions=True)
        assert_retryable(hung)
        stuck = server.wait_for_event("stuck")["threads"]
        assert any("decode" in thread for thread in stuck)


def test_sigterm_ends_a_process_that_hangs_while_it_loads(tmp_path):
    (tmp_path / "load").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
    ports: dict[str, Any] = {f"DAT_SERVER__{p}_PORT": "0" for p in ("HTTP", "GRPC", "METRICS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faulty_server", str(tmp_path)],
        cwd=ROOT,
        env=environment | ports | {"DAT_MODEL__NAME": "dat_nano", "DAT_LOG__FORMAT": "json"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert '"event": "model"' in process.stdout.readline()
        time.sleep(0.5)
        process.terminate()
        assert process.wait(10) == 0
        assert '"event": "stopped"' in process.stdout.read()
    finally:
        process.kill()
        process.communicate()
