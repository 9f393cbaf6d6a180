"""One contract, asked over every transport of a running server."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from model import create_model
from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import (
    JPEG,
    TRANSPORTS,
    channel,
    encoded,
    eventually,
    message,
    over_grpc,
    over_http,
    over_json,
    over_stream,
    read_http,
)
from tests.faults import faulty
from tests.server import ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S, RunningServer, start_server

every_transport = pytest.mark.parametrize("classify", TRANSPORTS)


@every_transport
async def test_an_image_gets_its_best_classes(server, classify):
    answer = await classify(server, [JPEG])
    assert answer.error is None
    assert (answer.model, answer.version) == ("dat_nano", "1")
    (result,) = answer.results
    assert result.size == (320, 240)
    assert result.layers is None
    scores = [score for _, _, score in result.predictions]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1 + 1e-6
    assert len({index for _, index, _ in result.predictions}) == 5


async def test_transports_give_the_same_answer(server):
    answers = [await classify(server, [JPEG], explain="points") for classify in TRANSPORTS]
    first = answers[0].results[0]
    for answer in answers[1:]:
        result = answer.results[0]
        assert [p[:2] for p in result.predictions] == [p[:2] for p in first.predictions]
        np.testing.assert_allclose(
            [p[2] for p in result.predictions], [p[2] for p in first.predictions], atol=1e-5
        )
        for ours, theirs in zip(result.layers, first.layers, strict=True):
            # JSON rounds to hundredths of a pixel.
            np.testing.assert_allclose(
                ours.sampling_locations, theirs.sampling_locations, atol=0.006
            )
            np.testing.assert_allclose(ours.reference_points, theirs.reference_points, atol=0.006)


@every_transport
async def test_images_are_answered_in_order_each_with_its_own_status(server, classify):
    images = [encoded(index=n, size=(100 + n, 120)) for n in range(6)]
    images[3] = b"not an image"
    images[5] = images[5][:300]
    answer = await classify(server, images, top_k=1)
    assert answer.error is None
    assert [r.error for r in answer.results] == [None] * 3 + [
        "invalid_image",
        None,
        "invalid_image",
    ]
    good = [n for n, result in enumerate(answer.results) if not result.error]
    assert [answer.results[n].size for n in good] == [(120, 100 + n) for n in good]
    alone = [(await classify(server, [images[n]], top_k=1)).results[0] for n in good]
    for n, single in zip(good, alone, strict=True):
        assert answer.results[n].predictions[0][:2] == single.predictions[0][:2]
        assert abs(answer.results[n].predictions[0][2] - single.predictions[0][2]) < 1e-5


@every_transport
async def test_top_k_is_at_most_all_classes(server, classify):
    predictions = (await classify(server, [JPEG], top_k=10**6)).results[0].predictions
    assert abs(sum(score for _, _, score in predictions) - 1) < 1e-5
    assert len((await classify(server, [JPEG], top_k=2)).results[0].predictions) == 2


@every_transport
async def test_points_lie_in_pixels_of_the_uploaded_image(server, classify):
    height, width = 300, 700
    answer = await classify(server, [encoded(size=(height, width))], explain="points")
    layers = answer.results[0].layers
    places = [(layer.stage, layer.block) for layer in create_model("dat_nano").deformable_layers]
    assert [(layer.stage, layer.block) for layer in layers] == places
    for layer in layers:
        _, rows, columns, _ = layer.sampling_locations.shape
        assert layer.reference_points.shape == (rows, columns, 2)
        assert np.abs(layer.sampling_locations - layer.reference_points).max() > 1
    # The last map has 4x4 cells, 32 pixels apart in the input of 128x128, and the reference
    # points lie between the centres of their receptive fields (at 0.5 pixel and so on). The
    # input is the centre of the image at 146x146.
    in_input = np.array([16.5, 48.5, 80.5, 112.5])
    columns, rows = (in_input + 9) * width / 146, (in_input + 9) * height / 146
    expected = np.stack(np.meshgrid(columns, rows), -1)
    np.testing.assert_allclose(layers[-1].reference_points, expected, atol=0.006)


@every_transport
@pytest.mark.parametrize(
    ("images", "options", "code"),
    [
        ([b"x" * 100], {}, "invalid_image"),
        ([b""], {}, "invalid_image"),
        ([JPEG[: len(JPEG) // 2]], {}, "invalid_image"),
        ([], {}, "no_images"),
        ([JPEG] * 33, {}, "too_many_images"),
        ([JPEG], {"top_k": 0}, "invalid_option"),
        ([JPEG], {"model": "resnet"}, "unknown_model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bad_request_gets_the_same_code_everywhere(server, classify, images, options, code):
    answer = await classify(server, images, **options)
    assert answer.error == code
    assert answer.results == ()
    assert answer.message or classify is over_stream
    assert (await classify(server, [JPEG])).error is None


@pytest.mark.parametrize(
    ("query", "body", "code"),
    [
        ("top_k=x", None, "invalid_option"),
        ("topk=3", None, "invalid_option"),
        ("explain=everything", None, "invalid_option"),
        ("timeout=-1", None, "invalid_option"),
        ("timeout=nan", None, "invalid_option"),
        ("top_k=1&top_k=2", None, "invalid_option"),
        ("", {"image": "A", "images": ["A"]}, "invalid_request"),
        ("", {"picture": "A"}, "invalid_option"),
        ("", {"image": 3}, "invalid_request"),
        ("top_k=1", {"image": "AAAA", "top_k": 2}, "invalid_option"),
        ("", {"image": "not base64!"}, "invalid_image"),
        ("", {"images": []}, "no_images"),
        ("", {}, "no_images"),
        ("", [], "invalid_request"),
    ],
)
async def test_http_says_what_is_wrong(server, query, body, code):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        if body is None:
            sent = {"content": JPEG, "headers": {"content-type": "image/jpeg"}}
        else:
            sent = {"json": body}
        answer = read_http(await client.post(f"/v1/classify?{query}", **sent))
    assert (answer.error, answer.status) == (code, 400)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b'{"image": "\xff"}', b"null", b""])
async def test_malformed_json_is_a_bad_request(server, content):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        headers = {"content-type": "application/json"}
        answer = read_http(await client.post("/v1/classify", content=content, headers=headers))
    assert (answer.error, answer.status) == ("invalid_request", 400)


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"nothing of the kind"),
        (
            "multipart/form-data; boundary=b",
            b"--b\r\nContent-Disposition: form-data\r\n\r\n1\r\n--b--",
        ),
    ],
)
async def test_malformed_multipart_is_a_bad_request(server, content_type, content):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        headers = {"content-type": content_type}
        answer = read_http(await client.post("/v1/classify", content=content, headers=headers))
    assert answer.status == 400
    assert answer.error in ("invalid_request", "no_images")


async def test_multipart_takes_options_as_fields(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        files = {"file": ("a.jpg", JPEG)}
        response = await client.post(
            "/v1/classify", files=files, data={"top_k": "3", "explain": "points"}
        )
    result = read_http(response).results[0]
    assert len(result.predictions) == 3
    assert result.layers


async def test_one_bad_base64_of_many_fails_alone(server):
    good = base64.b64encode(JPEG).decode()
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        response = await client.post("/v1/classify", json={"images": [good, "%%%", good]})
    assert [r.error for r in read_http(response).results] == [None, "invalid_image", None]


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("image/jpeg", 200),
        ("image/png", 200),  # what the bytes are decides, not what they are called
        ("IMAGE/JPEG; q=1", 200),
        ("image/jpg", 200),  # as old systems say
        ("image/pjpeg", 200),
        ("application/octet-stream", 200),
        (None, 200),
        ("image/gif", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
async def test_raw_bodies_by_content_type(server, content_type, status):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        headers = {} if content_type is None else {"content-type": content_type}
        response = await client.post("/v1/classify", content=JPEG, headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
async def test_formats(server, format_):
    assert (await over_http(server, [encoded(format_)])).error is None


async def test_http_headers_tell_the_timing_and_the_request(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        headers = {"content-type": "image/jpeg", "x-request-id": "mine-1"}
        response = await client.post("/v1/classify", content=JPEG, headers=headers)
        assert response.headers["x-request-id"] == "mine-1"
        assert response.json()["request_id"] == "mine-1"
        stages = [
            part.split(";")[0].strip() for part in response.headers["server-timing"].split(",")
        ]
        assert stages == ["decode", "queue", "compute", "batch"]
        odd = await client.get("/health/live", headers={"x-request-id": "a b\tc" * 99})
        assert len(odd.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/classify", 405), ("GET", "/x", 404)]
)
async def test_unknown_paths_have_the_same_error_form(server, method, path, status):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        assert read_http(await client.request(method, path)).status == status


async def test_the_openapi_document_describes_bodies_options_and_errors(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        document = (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/classify"]["post"]
    assert {"image/jpeg", "multipart/form-data", "application/json"} <= set(
        operation["requestBody"]["content"]
    )
    of_attention = {"queries", "layers", "top_n"}
    names = {"top_k", "explain", "timeout", "model", "priority", *of_attention}
    assert {p["name"] for p in operation["parameters"]} == names
    assert {"200", "400", "413", "415", "429", "503", "504"} <= set(operation["responses"])
    assert "ErrorAnswer" in document["components"]["schemas"]


async def test_a_body_over_the_limit_is_refused_before_it_is_read(server):
    """Only the head is sent; the answer comes all the same."""
    host, port = server.http_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
        b"Content-Length: 100000000\r\n\r\n"
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    body = json.loads(await reader.readexactly(length))
    assert body["error"]["code"] == "image_too_large"
    writer.close()


async def test_a_chunked_body_over_the_limit_is_refused(server):
    async def chunks():
        for _ in range(20):
            yield b"x" * 2**20

    async with httpx.AsyncClient(base_url=server.http_url) as client:
        response = await client.post(
            "/v1/classify", content=chunks(), headers={"content-type": "image/jpeg"}
        )
        assert read_http(response).status == 413
        # The rest of the body was dropped, so the connection serves the next request.
        assert (await client.get("/health/live")).status_code == 200


@pytest.mark.parametrize("classify", [over_json, over_grpc, over_stream])
async def test_an_image_over_the_limit_of_bytes(server, classify):
    answer = await classify(server, [b"\xff" * (16 * 2**20 + 1)])
    assert answer.error == "image_too_large"


async def test_a_message_over_the_limit_is_refused_by_grpc(server):
    answer = await over_grpc(server, [b"x" * 2**20] * 66)
    assert (answer.status, answer.error) == ("INVALID_ARGUMENT", "image_too_large")


@pytest.fixture(scope="module")
def many_pixels():
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG", optimize=True)
    assert len(file.getvalue()) < 100_000
    return file.getvalue()


@every_transport
async def test_a_picture_with_too_many_pixels_is_refused_by_its_header(
    server, classify, many_pixels
):
    assert (await classify(server, [many_pixels])).error == "image_too_large"


async def test_stream_answers_every_request_by_its_id(server):
    requests = [
        dat_pb2.ClassifyStreamRequest(
            id=str(n), request=message([b"bad" if n % 5 == 0 else encoded(index=n)], top_k=1)
        )
        for n in range(60)
    ]
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        answers = {a.id: a async for a in stub.ClassifyStream(requests)}
    assert answers.keys() == {request.id for request in requests}
    for n in range(60):
        assert answers[str(n)].HasField("error") == (n % 5 == 0)


async def test_requests_with_and_without_points_share_batches(server):
    before = server.metrics()
    answers = await asyncio.gather(
        *(
            over_grpc(server, [encoded(index=n)], explain="points" if n % 2 else "none")
            for n in range(40)
        )
    )
    for n, answer in enumerate(answers):
        assert (answer.results[0].layers is not None) == bool(n % 2)
    assert max(answer.results[0].batch_size for answer in answers) > 1
    after = server.metrics()
    images = "dat_images_total,model=dat_nano,task=classify"
    batches = sum(
        after[name] - before[name] for name in after if name.startswith("dat_batches_total")
    )
    assert after[images] - before[images] == 40
    assert batches < 40


async def test_grpc_health_and_reflection(server):
    async with channel(server) as open_channel:
        health = health_pb2_grpc.HealthStub(open_channel)
        for service in ("", "dat.v1.ClassifierService"):
            status = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert status.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(open_channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        async for answer in reflection.ServerReflectionInfo(asked):
            names = {s.name for s in answer.list_services_response.service}
    assert "dat.v1.ClassifierService" in names


async def test_health_endpoints(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        for probe in ("live", "ready", "startup"):
            assert (await client.get(f"/health/{probe}")).status_code == 200


# A server whose device waits for the test, to be caught in the middle of its work.


def outcomes(server: RunningServer, protocol: str) -> Counter[str]:
    prefix = "dat_requests_total,model=dat_nano,outcome="
    return Counter(
        {
            name.removeprefix(prefix).split(",")[0]: int(value)
            for name, value in server.metrics().items()
            if name.startswith(prefix) and name.endswith(f"protocol={protocol},task=classify")
        }
    )


def device_rows(server: RunningServer) -> float:
    return server.metrics()["dat_batch_images_total,kind=real,model=dat_nano"]


def queue_full(server: RunningServer) -> float:
    return server.metrics().get("dat_requests_rejected_total,reason=queue_full", 0)


WAITING = "dat_requests_waiting,model=dat_nano"
# Places in the queue; one that is computed, and one that the device may have taken ahead.
PLACES, ON_DEVICE = 8, 2


@pytest.mark.parametrize("classify", [over_http, over_grpc])
async def test_overload_is_refused_at_once_and_nothing_admitted_is_lost(slow_server, classify):
    server = slow_server.server
    protocol = "http" if classify is over_http else "grpc"
    counted, rows, full = outcomes(server, protocol), device_rows(server), queue_full(server)
    with slow_server.fault("wait"):
        asking = [asyncio.create_task(classify(server, [JPEG])) for _ in range(40)]
        await eventually(lambda: sum(one.done() for one in asking) >= 40 - PLACES - ON_DEVICE)
    answers = await asyncio.gather(*asking)
    refused = [answer for answer in answers if answer.error]
    assert {answer.error for answer in refused} == {"overloaded"}
    assert {answer.status for answer in refused} == {
        429 if classify is over_http else "RESOURCE_EXHAUSTED"
    }
    assert PLACES <= len(answers) - len(refused) <= PLACES + ON_DEVICE
    assert (await classify(server, [JPEG])).error is None
    counted = outcomes(server, protocol) - counted
    assert counted["rejected"] == len(refused)
    assert counted["ok"] == 41 - len(refused) == device_rows(server) - rows
    assert server.metrics()[WAITING] == 0
    assert queue_full(server) - full == len(refused)


async def test_overload_says_when_to_come_back(slow_server):
    async with httpx.AsyncClient(base_url=slow_server.server.http_url, timeout=60) as client:
        headers = {"content-type": "image/jpeg"}
        with slow_server.fault("wait"):
            asking = [
                asyncio.create_task(client.post("/v1/classify", content=JPEG, headers=headers))
                for _ in range(30)
            ]
            await eventually(lambda: sum(one.done() for one in asking) >= 30 - PLACES - ON_DEVICE)
        responses = await asyncio.gather(*asking)
    refused = [response for response in responses if response.status_code == 429]
    assert refused
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)


@pytest.mark.slow
async def test_an_image_whose_deadline_passes_never_reaches_the_device(fresh_slow_server):
    """Nothing was computed yet, so the server cannot foresee that they come too late."""
    server = fresh_slow_server.server
    with fresh_slow_server.fault("wait"):
        busy = [asyncio.create_task(over_http(server, [JPEG])) for _ in range(6)]
        await eventually(lambda: server.metrics()[WAITING] >= 6 - ON_DEVICE)
        for classify, status in ((over_http, 504), (over_grpc, "DEADLINE_EXCEEDED")):
            late = await classify(server, [JPEG], timeout=0.5)
            assert (late.error, late.status) == ("deadline_exceeded", status)
    assert all(answer.error is None for answer in await asyncio.gather(*busy))
    assert device_rows(server) == 6


async def test_a_client_that_leaves_takes_its_image_out_of_the_queue(slow_server):
    server = slow_server.server
    rows = device_rows(server)
    before = {protocol: outcomes(server, protocol) for protocol in ("http", "grpc")}

    def in_flight(protocol):
        return server.metrics()[f"dat_requests_in_flight,protocol={protocol}"]

    with slow_server.fault("wait"):
        busy = [asyncio.create_task(over_http(server, [JPEG])) for _ in range(5)]
        await eventually(lambda: server.metrics()[WAITING] >= 5 - ON_DEVICE)
        host, port = server.http_url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=0.3) as leaving:

            def asks() -> bool:
                # Callers of other tests have left, so that it may be turned away for a while.
                leaving.sendall(
                    b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n"
                    b"Content-Length: %d\r\n\r\n" % len(JPEG) + JPEG
                )
                try:
                    return not leaving.recv(4096)
                except TimeoutError:
                    return True

            await eventually(asks)
            assert in_flight("http") == 6
        call = asyncio.create_task(over_grpc(server, [JPEG]))
        await eventually(lambda: in_flight("grpc") == 1)
        call.cancel()
        for protocol, left in (("http", 5), ("grpc", 0)):
            await eventually(lambda p=protocol, n=left: in_flight(p) == n)
            assert (outcomes(server, protocol) - before[protocol])["cancelled"] == 1
    assert all(answer.error is None for answer in await asyncio.gather(*busy))
    assert device_rows(server) - rows == 5


async def test_sigterm_answers_what_was_admitted_and_exits_with_0(fresh_slow_server):
    server = fresh_slow_server.server
    with fresh_slow_server.fault("wait"):
        admitted = [
            asyncio.create_task(classify(server, [JPEG]))
            for classify in (over_http, over_grpc, over_stream) * 2
        ]
        await eventually(lambda: server.metrics()[WAITING] >= 6 - ON_DEVICE)
        for protocol in ("http", "grpc", "stream"):
            name = f"dat_requests_in_flight,protocol={protocol}"
            await eventually(lambda n=name: server.metrics()[n] == 2)
        server.process.terminate()
        await asyncio.to_thread(server.wait_for_event, "draining")
    answers = await asyncio.gather(*admitted)
    assert {answer.error for answer in answers} == {None}
    assert await asyncio.to_thread(server.process.wait, STOP_TIMEOUT_S) == 0


async def test_readiness_goes_off_first_and_requests_are_admitted_for_the_drain_delay():
    with start_server(
        DAT_MODEL__NAME="dat_nano", DAT_BATCHING__MAX_BATCH=1, DAT_SERVER__DRAIN_DELAY_S=2
    ) as server:
        server.process.terminate()
        server.wait_for_event("draining")
        async with httpx.AsyncClient(base_url=server.http_url) as client:
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
        for classify in TRANSPORTS:
            assert (await classify(server, [JPEG])).error is None
        assert await asyncio.to_thread(server.process.wait, 30) == 0


@pytest.mark.slow
def test_a_signal_right_after_the_start_or_during_it_ends_in_order():
    with start_server() as server:
        assert server.terminate() == 0
    with start_server(DAT_SERVER__DRAIN_DELAY_S=0) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once():
    with start_server(DAT_SERVER__DRAIN_DELAY_S=60) as server:
        server.process.terminate()
        server.wait_for_event("draining")
        assert server.terminate() == -signal.SIGTERM


def test_a_taken_port_is_a_clear_error(server):
    port = int(server.http_url.rsplit(":", 1)[1])
    with (
        pytest.raises(AssertionError, match="ended with 1"),
        start_server(DAT_SERVER__HTTP_PORT=port),
    ):
        pass


async def test_an_unknown_explain_value_is_refused(server):
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Classify(dat_pb2.ClassifyRequest(images=[JPEG], explain=9))
    assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_grpc_keeps_the_request_id_of_the_caller(server):
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        for given, kept in (("mine-2", True), ("x" * 129, False)):
            call = stub.Classify(message([JPEG]), metadata=(("x-request-id", given),))
            await call
            answered = dict(await call.trailing_metadata())["x-request-id"]
            assert (answered == given) == kept


@pytest.mark.slow
def test_a_starting_server_is_alive_and_refuses_until_it_is_ready(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    loading = tmp_path / "load"
    loading.touch()
    asking = httpx.HTTPTransport(retries=8)
    url = f"http://127.0.0.1:{port}"

    def ask_early(client: httpx.Client) -> tuple[int, ...]:
        try:
            answers = [client.get(f"/health/{p}") for p in ("live", "startup", "ready")]
            headers = {"content-type": "image/jpeg"}
            answers.append(client.post("/v1/classify", content=JPEG, headers=headers))
        finally:
            loading.unlink()
        return tuple(answer.status_code for answer in answers)

    with (
        httpx.Client(base_url=url, timeout=START_TIMEOUT_S, transport=asking) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        early = thread.submit(ask_early, client)
        with faulty(tmp_path, DAT_SERVER__HTTP_PORT=port):
            assert early.result() == (200, 503, 503, 503)
            assert httpx.get(f"{url}/health/startup").status_code == 200


def test_the_health_check_command_asks_whether_the_server_is_ready(server):
    port = server.http_url.rsplit(":", 1)[1]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        closed = unused.getsockname()[1]
    for asked, exit_code in ((port, 0), (closed, 1)):
        done = subprocess.run(
            [sys.executable, "-m", "service", "healthcheck"],
            cwd=ROOT,
            env={"DAT_SERVER__HTTP_PORT": str(asked)},
            capture_output=True,
        )
        assert done.returncode == exit_code
