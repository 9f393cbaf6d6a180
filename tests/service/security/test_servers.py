"""Keys and certificates as clients meet them: real servers, httpx, curl and gRPC."""

import asyncio
import contextlib
import itertools
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.pb import dat_pb2, dat_pb2_grpc, inference_pb2, inference_pb2_grpc
from service.security.keys import add_key
from service.transport.oip.shared_memory import OBJECTS
from tests.certificates import Authority, Pair
from tests.clients import JPEG, eventually, message
from tests.server import ROOT, RunningServer, start_server
from tests.service.commands import run_all

RAW = {"content-type": "image/jpeg"}
PAGE = "https://a.example"
OK, UNAUTHENTICATED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
SHORT_S = 1.0
MOST = 16
CLASSIFY = "/v1/classify?top_k=1"


@dataclass(frozen=True)
class Keyed:
    """A server in plain text with keys."""

    server: RunningServer
    file: Path
    good: str

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.good if key is None else key}"}
        return httpx.AsyncClient(base_url=self.server.http_url, headers=headers, timeout=60)


@dataclass(frozen=True)
class Mutual:
    """A server that asks its clients for certificates."""

    server: RunningServer
    folder: Path
    authority: Authority
    other: Authority
    shown: Pair
    mine: Pair

    @property
    def url(self) -> str:
        return self.server.http_url.replace("http://", "https://")

    def trust(self, own: Pair | None) -> ssl.SSLContext:
        """A client's context, with a certificate of its own or none."""
        context = ssl.create_default_context(cafile=self.authority.certificate)
        if own is not None:
            context.load_cert_chain(*own.files)
        return context

    def client(self, own: Pair | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, verify=self.trust(own), timeout=60)

    def channel(self, own: Pair | None) -> grpc.aio.Channel:
        pair = (None, None) if own is None else (own.key.read_bytes(), own.certificate.read_bytes())
        roots = self.authority.certificate.read_bytes()
        credentials = grpc.ssl_channel_credentials(roots, *pair)
        # Otherwise a second channel takes the connection of the first.
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(self.server.grpc_target, credentials, options)

    def serial(self) -> int:
        """The number of the certificate that a new connection sees."""
        host, port = self.server.grpc_target.split(":")[0], int(self.url.rsplit(":", 1)[1])
        with (
            socket.create_connection((host, port), 10) as plain,
            self.trust(self.mine).wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            shown = secure.getpeercert()
            assert shown is not None
            return int(str(shown["serialNumber"]), 16)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Keyed, Mutual]]:
    """Both, started at the same time."""
    folder = tmp_path_factory.mktemp("security")
    file = folder / "keys.toml"
    good = add_key(file, "good")
    authority, other = Authority(folder), Authority(folder, "other")
    shown, mine = authority.issue("server"), authority.issue("client")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        keyed = pool.submit(
            lambda: stack.enter_context(
                start_server(
                    DAT_MODEL__NAME="dat_nano",
                    DAT_SECURITY__API_KEYS=file,
                    DAT_SERVER__CORS_ORIGINS=PAGE,
                    DAT_LIMITS__MAX_SHARED_MEMORY_BYTES=2**20,
                    DAT_BATCHING__MAX_BATCH=1,
                )
            )
        )
        mutual = pool.submit(lambda: stack.enter_context(start_mutual(authority, shown)))
        yield (
            Keyed(keyed.result(), file, good),
            Mutual(mutual.result(), folder, authority, other, shown, mine),
        )


def start_mutual(
    authority: Authority, shown: Pair
) -> "contextlib.AbstractContextManager[RunningServer]":
    return start_server(
        DAT_MODEL__NAME="dat_nano",
        DAT_SECURITY__TLS_CERTIFICATE=shown.certificate,
        DAT_SECURITY__TLS_KEY=shown.key,
        DAT_SECURITY__CLIENT_CA=authority.certificate,
        DAT_SERVER__HEADER_TIMEOUT_S=SHORT_S,
        DAT_SERVER__MAX_CONNECTIONS=MOST,
        DAT_BATCHING__MAX_BATCH=1,
    )


@pytest.fixture
def keyed(servers: tuple[Keyed, Mutual]) -> Keyed:
    return servers[0]


@pytest.fixture
def mutual(servers: tuple[Keyed, Mutual]) -> Mutual:
    return servers[1]


def refused(server: RunningServer, key: str, code: str) -> float:
    return server.metrics()[f"dat_key_requests_refused_total,code={code},key={key}"]


def written(server: RunningServer) -> list[dict[str, Any]]:
    """The lines of the log since the last look."""
    lines = []
    while not server.log.empty():
        lines.append(server.log.get() or {})
    return lines


# Keys


async def test_a_key_opens_all_but_what_is_open_anyway(keyed):
    image = {"content": JPEG, "headers": RAW}
    async with keyed.client() as good, keyed.client("dat_" + "x" * 43) as wrong:
        for method, path, sent in [
            ("POST", CLASSIFY, image),
            ("GET", "/v1/models", {}),
            ("GET", "/openapi.json", {}),
            ("HEAD", "/v1/models", {}),
            ("GET", "/v2/models/stats", {}),
            ("POST", "/v2/repository/index", {}),
            ("POST", "/v2/repository/models/dat_nano/unload", {}),
            ("GET", "/nowhere", {}),
            ("OPTIONS", "/v1/classify", {}),
        ]:
            answer = await wrong.request(method, path, **sent)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Bearer ")
            if path.startswith("/v2"):
                assert isinstance(answer.json()["error"], str)
            elif method != "HEAD":
                assert answer.json()["error"]["code"] == "unauthenticated"
            assert (await good.request(method, path, **sent)).status_code != 401, path
        for path in ("/health/live", "/health/ready", "/health/startup"):
            assert (await wrong.get(path)).status_code == 200
        assert (await good.post(CLASSIFY, **image)).status_code == 200
        only = {"x-api-key": keyed.good, "authorization": "Basic eDp5"}
        assert (await wrong.get("/v1/models", headers=only)).status_code == 200
        assert (await asyncio.to_thread(httpx.get, keyed.server.metrics_url)).status_code == 200


async def test_the_body_of_a_stranger_is_not_read(keyed):
    async def stranger(*lines: str) -> bytes:
        host, port = keyed.server.http_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = ["POST /v1/classify HTTP/1.1", "Host: x", "Content-Length: 10000000", *lines]
        writer.write("\r\n".join([*head, "", ""]).encode())
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        writer.close()
        return answer

    held = "dat_request_bytes_in_flight"
    for lines in ((), ("Expect: 100-continue",), (f"Origin: {PAGE}",)):
        assert (await stranger(*lines)).startswith(b"HTTP/1.1 401 ")
        assert keyed.server.metrics()[held] == 0
    assert (
        await stranger("Expect: 100-continue", f"X-Api-Key: {keyed.good}")
    ).startswith(b"HTTP/1.1 100 ")  # fmt: skip
    await eventually(lambda: keyed.server.metrics()[held] == 0)


async def test_a_page_of_another_origin_may_ask_whether_it_may_and_reads_why_not(keyed):
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-api-key",
    }
    async with httpx.AsyncClient(base_url=keyed.server.http_url, timeout=60) as client:
        preflight = await client.options("/v1/classify", headers=asked)
        assert preflight.status_code == 200
        assert "x-api-key" in preflight.headers["access-control-allow-headers"]
        answer = await client.post("/v1/classify", content=JPEG, headers=RAW | {"origin": PAGE})
        assert answer.status_code == 401
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["www-authenticate"].startswith("Bearer ")


def test_curl_shows_a_key(keyed):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl")
    large = ["--data-binary", f"@{ROOT}/demo/dat_nano.safetensors"]  # it waits for leave to send it
    for key, sent, status in [
        (keyed.good, [], "200"),
        (keyed.good + "x", [], "401"),
        (keyed.good, large, "400"),
        (keyed.good + "x", large, "401"),
    ]:
        url = f"{keyed.server.http_url}/v1/{'classify' if sent else 'models'}"
        given = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: image/jpeg", *sent]
        output = ["-sS", "-o", "/dev/null", "-w", "%{http_code}"]
        ended = subprocess.run([curl, *output, *given, url], capture_output=True, text=True)
        assert (ended.stdout, ended.stderr) == (status, "")


async def test_grpc_asks_for_the_same_keys(keyed):
    ask = message([JPEG])
    streamed = dat_pb2.ClassifyStreamRequest(id="1", request=ask)
    before = refused(keyed.server, "_none", "unauthenticated")
    tries = 0
    async with grpc.aio.insecure_channel(keyed.server.grpc_target) as channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(channel)
        models = dat_pb2_grpc.ModelServiceStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        for metadata in (None, [("x-api-key", "x" * 43)], [("authorization", "Bearer x")]):
            for call in (
                stub.Classify(ask, metadata=metadata),
                models.ListModels(dat_pb2.ListModelsRequest(), metadata=metadata),
                stub.ClassifyStream(itertools.repeat(streamed, 50), metadata=metadata),
                reflection.ServerReflectionInfo([listing], metadata=metadata),
            ):
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                assert "dat-error-code" in dict(await call.trailing_metadata())
                tries += 1
        for metadata in ([("x-api-key", keyed.good)], [("authorization", f"Bearer {keyed.good}")]):
            assert (await stub.Classify(ask, metadata=metadata)).results[0].classification
            answers = [a async for a in stub.ClassifyStream([streamed], metadata=metadata)]
            assert answers[0].response.model == "dat_nano"
            described = reflection.ServerReflectionInfo([listing], metadata=metadata)
            assert [answer async for answer in described]
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
    assert refused(keyed.server, "_none", "unauthenticated") == before + tries


async def test_the_open_inference_protocol_asks_for_the_same_keys_and_shows_its_health(keyed):
    headers = {"inference-header-content-length": "0"}
    infer = "/v2/models/dat_nano/infer"
    async with keyed.client() as good, keyed.client("dat_" + "x" * 43) as wrong:
        for method, path in (
            ("POST", infer), ("GET", "/v2"), ("GET", "/v2/models/dat_nano/ready"), ("GET", "/v2/x")
        ):  # fmt: skip
            answer = await wrong.request(method, path, content=JPEG, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"].startswith("Bearer ")
            assert isinstance(answer.json()["error"], str)
        assert (await good.post(infer, content=JPEG, headers=headers)).status_code == 200
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await wrong.get(path)).status_code == 200
    asked = inference_pb2.ModelMetadataRequest(name="dat_nano")
    async with grpc.aio.insecure_channel(keyed.server.grpc_target) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for call in (
            stub.ModelMetadata(asked),
            stub.ModelInfer(inference_pb2.ModelInferRequest(model_name="dat_nano")),
            stub.ModelStreamInfer([inference_pb2.ModelInferRequest()]),
        ):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await stub.ServerReady(inference_pb2.ServerReadyRequest())).ready
        assert (await stub.ModelMetadata(asked, metadata=[("x-api-key", keyed.good)])).inputs


async def test_a_region_of_shared_memory_belongs_to_the_key_that_registered_it(keyed):
    element = len(JPEG).to_bytes(4, "little") + JPEG
    key, base = f"of-the-test-{os.getpid()}", "/v2/systemsharedmemory"
    place = {"shared_memory_region": "mine", "shared_memory_byte_size": len(element)}
    request = {
        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": place}]
    }
    region = {"key": key, "byte_size": len(element)}
    other = add_key(keyed.file, "other")
    (OBJECTS / key).write_bytes(element)
    try:
        async with keyed.client() as owner, keyed.client(other) as stranger:
            await eventually(lambda: httpx.get(
                f"{keyed.server.http_url}/v2", headers={"x-api-key": other}
            ).status_code == 200)  # fmt: skip

            async def infer(who: httpx.AsyncClient) -> httpx.Response:
                return await who.post("/v2/models/dat_nano/infer", json=request)

            answer = await owner.post(f"{base}/region/mine/register", json=region)
            assert answer.status_code == 200
            assert (await infer(owner)).status_code == 200
            assert (await stranger.get(f"{base}/status")).json() == []
            assert "register it first" in (await infer(stranger)).json()["error"]
            assert (await stranger.post(f"{base}/unregister")).status_code == 200
            assert [one["name"] for one in (await owner.get(f"{base}/status")).json()] == ["mine"]
            call = inference_pb2.SystemSharedMemoryStatusRequest()
            async with grpc.aio.insecure_channel(keyed.server.grpc_target) as channel:
                stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
                for shown, names in ((keyed.good, {"mine"}), (other, set())):
                    told = await stub.SystemSharedMemoryStatus(
                        call, metadata=[("x-api-key", shown)]
                    )
                    assert set(told.regions) == names
                assert await stub.SystemSharedMemoryStatus(call).code() is UNAUTHENTICATED
            async with keyed.client("dat_" + "x" * 43) as nobody:
                answer = await nobody.post(f"{base}/region/r/register", json=region)
                assert answer.status_code == 401
            assert (await owner.post(f"{base}/region/mine/unregister")).status_code == 200
            assert "register it first" in (await infer(owner)).json()["error"]
    finally:
        (OBJECTS / key).unlink()


async def test_keys_come_and_go_while_requests_are_in_flight(keyed):
    """Every request of a key that stays is answered; a stream of one that goes is told."""
    base = keyed.file.read_text()
    leaving = add_key(keyed.file, "leaving")
    ended = asyncio.Event()

    async def ask_on(client: httpx.AsyncClient) -> set[int]:
        seen = set()
        while not ended.is_set():
            answer = await client.post(CLASSIFY, content=JPEG, headers=RAW)
            seen.add(answer.status_code)
        return seen

    async with (
        keyed.client() as good,
        keyed.client(leaving) as other,
        grpc.aio.insecure_channel(keyed.server.grpc_target) as channel,
    ):
        stub = dat_pb2_grpc.ClassifierServiceStub(channel)
        asking = [asyncio.create_task(ask_on(good)) for _ in range(4)]

        async def status():
            answer = await other.get("/v1/models")
            return answer.status_code

        async def until(wanted: int) -> None:
            async with asyncio.timeout(30):
                while await status() != wanted:
                    await asyncio.sleep(0.05)

        await until(200)
        stream = stub.ClassifyStream(metadata=[("x-api-key", leaving)])
        await stream.write(dat_pb2.ClassifyStreamRequest(id="1", request=message([JPEG])))
        assert (await stream.read()).WhichOneof("outcome") == "response"
        # What is no key file changes nothing.
        failures = "dat_security_reloads_total,kind=keys,outcome=failed"
        before = keyed.server.metrics()[failures]
        keyed.file.write_text("garbage")
        await eventually(lambda: keyed.server.metrics()[failures] == before + 1)
        assert await status() == 200
        keyed.file.write_text(base)
        await until(401)
        await stream.write(dat_pb2.ClassifyStreamRequest(id="2", request=message([JPEG])))
        told = await stream.read()
        assert (told.id, told.error.code) == ("2", "unauthenticated")
        await stream.done_writing()
        ended.set()
        assert set.union(*await asyncio.gather(*asking)) == {200}


async def test_a_key_has_its_rate_and_the_others_do_not_feel_it(keyed):
    base = keyed.file.read_text()
    slow = add_key(keyed.file, "slow", images_per_s=0.01, burst=5)
    try:
        async with keyed.client(slow) as client, keyed.client() as good:
            async with asyncio.timeout(30):
                while (await client.get("/v1/models")).status_code == 401:
                    await asyncio.sleep(0.05)
            three = {"files": [("file", ("a.jpg", JPEG))] * 3}
            assert (await client.post("/v1/classify", **three)).status_code == 200
            for _ in range(2):  # two are left
                again = await client.post("/v1/classify", **three)
                assert again.status_code == 429
                assert again.json()["error"]["code"] == "rate_limited"
                assert 90 <= int(again.headers["retry-after"]) <= 100
            metadata = [("x-api-key", slow)]
            async with grpc.aio.insecure_channel(keyed.server.grpc_target) as channel:
                stub = dat_pb2_grpc.ClassifierServiceStub(channel)
                assert (await stub.Classify(message([JPEG] * 2), metadata=metadata)).results
                call = stub.Classify(message([JPEG]), metadata=metadata)
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                trailing = dict(await call.trailing_metadata())
                assert trailing["dat-error-code"] == "rate_limited"
                assert 90_000 <= int(trailing["grpc-retry-pushback-ms"]) <= 100_000
            by_head = await client.post(CLASSIFY, content=JPEG, headers=RAW)
            assert by_head.status_code == 429
            assert (await good.post("/v1/classify", **three)).status_code == 200
        seen = keyed.server.metrics()
        assert seen["dat_key_images_total,key=slow"] == 5
        assert refused(keyed.server, "slow", "rate_limited") == 4
    finally:
        keyed.file.write_text(base)


async def test_a_flood_of_wrong_keys_fails_nobody_else(keyed):
    """Four connections send wrong keys as fast as they are refused, while another asks on."""
    each, server = 1500, keyed.server
    host, port = server.http_url.removeprefix("http://").split(":")
    before = refused(server, "_none", "unauthenticated")

    async def flood(number: int) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        seen = 0
        for turn in range(each // 50):
            lines = (
                f"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-API-Key: {number:09}{turn:09}{n:09}"
                for n in range(50)
            )
            writer.write("".join(f"{line}{'x' * 9}\r\n\r\n" for line in lines).encode())
            for _ in range(50):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 401 ")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                seen += 1
        writer.close()
        return seen

    written(server)
    async with keyed.client() as good:
        flooding = [asyncio.create_task(flood(n)) for n in range(4)]
        answers = []
        while not all(task.done() for task in flooding):
            answers.append(await good.post(CLASSIFY, content=JPEG, headers=RAW))
        assert await asyncio.gather(*flooding) == [each] * 4
    assert answers
    assert {answer.status_code for answer in answers} == {200}
    assert refused(server, "_none", "unauthenticated") == before + 4 * each
    # The application was not asked, which would cost thirty times as much.
    assert all(line.get("status") != 401 for line in written(server))


async def test_no_key_is_in_the_log(keyed):
    async with keyed.client() as good, keyed.client("k" * 43) as wrong:
        await good.post(CLASSIFY, content=JPEG, headers=RAW)
        await wrong.post(CLASSIFY, content=JPEG, headers=RAW | {"origin": PAGE})
    await asyncio.to_thread(keyed.server.wait_for_event, "requests without a known key")
    text = str(written(keyed.server))
    assert keyed.good not in text
    assert "k" * 43 not in text


# TLS


async def test_both_transports_take_clients_with_a_certificate(mutual):
    async with mutual.client(mutual.mine) as client, mutual.channel(mutual.mine) as channel:
        for _ in range(3):  # on one connection
            answer = await client.post(CLASSIFY, content=JPEG, headers=RAW)
            assert answer.status_code == 200
        stub = dat_pb2_grpc.ClassifierServiceStub(channel)
        assert (await stub.Classify(message([JPEG]))).results
        asked = [
            dat_pb2.ClassifyStreamRequest(id=str(n), request=message([JPEG])) for n in range(20)
        ]
        assert {answer.id async for answer in stub.ClassifyStream(asked)} == {
            str(n) for n in range(20)
        }
    large = {"content": b"\xff\xd8" + bytes(4 << 20), "headers": RAW}
    async with mutual.client(mutual.mine) as client:
        assert (await client.post(CLASSIFY, **large)).json()["error"]["code"] == "invalid_image"
        points = await client.post("/v1/classify?explain=points", content=JPEG, headers=RAW)
        assert points.json()["results"][0]["points"]


async def test_a_client_without_a_certificate_may_ask_for_health_alone(mutual):
    async with mutual.client(None) as client:
        assert (await client.get("/health/ready")).status_code == 200
        for sent in (("GET", "/v1/models"), ("POST", "/v1/classify"), ("GET", "/openapi.json")):
            answer = await client.request(*sent)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "certificate_required"
        assert (await client.get("/v2/health/ready")).status_code == 200
        answer = await client.get("/v2")
        assert (answer.status_code, list(answer.json())) == (403, ["error"])
    async with mutual.channel(None) as channel:
        call = dat_pb2_grpc.ClassifierServiceStub(channel).Classify(message([JPEG]), timeout=20)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_strange_certificates_and_plain_text_get_nowhere(mutual):
    before = mutual.server.metrics()["dat_connections_cut_total,port=http,reason=handshake"]
    expired = mutual.authority.issue("old", days=-1)
    for pair in (mutual.other.issue("stranger"), expired):
        async with mutual.client(pair) as client:
            with pytest.raises(httpx.TransportError):
                await client.get("/health/ready")
        async with mutual.channel(pair) as channel:
            call = dat_pb2_grpc.ClassifierServiceStub(channel).Classify(message([JPEG]), timeout=20)
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
    async with httpx.AsyncClient(timeout=20) as plain:
        with pytest.raises(httpx.TransportError):
            await plain.get(f"{mutual.server.http_url}/health/ready")
    metrics = mutual.server.metrics
    cut = "dat_connections_cut_total,port=http,reason=handshake"
    await eventually(lambda: metrics()[cut] == before + 3)
    async with mutual.client(mutual.mine) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_handshakes_that_never_end_are_cut_and_hold_no_place(mutual):
    """More of them than there may be connections, some with the beginning of a handshake."""
    host, port = "127.0.0.1", int(mutual.url.rsplit(":", 1)[1])
    metrics = mutual.server.metrics
    late = "dat_connections_cut_total,port=http,reason=header_timeout"
    before = metrics()[late]
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, port), 20))
            for _ in range(MOST // 2)
        ]
        for connection in silent[::2]:
            connection.sendall(b"\x16\x03\x01\x02\x00\x01")
        async with mutual.client(mutual.mine) as client:
            assert (await client.get("/v1/models")).status_code == 200
        for connection in silent:
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(connection.recv, 1) == b""
        assert metrics()[late] - before == len(silent)
        # With all places taken, those who have waited long give way.
        crowd = [
            stack.enter_context(socket.create_connection((host, port), 20)) for _ in range(2 * MOST)
        ]
        await eventually(lambda: metrics()["dat_connections,port=http"] <= MOST + 8)
        async with mutual.client(mutual.mine) as client:
            async with asyncio.timeout(30):
                while (await client.get("/v1/models")).status_code != 200:
                    await asyncio.sleep(0.05)
        del crowd
    await eventually(lambda: metrics()["dat_connections,port=http"] == 0)


async def test_certificates_rotate_under_load_without_a_failure(mutual):
    ended = asyncio.Event()
    first = mutual.serial()

    async def over_http(one_connection: bool) -> int:
        answered = 0
        client = mutual.client(mutual.mine)
        while not ended.is_set():
            answer = await client.post(CLASSIFY, content=JPEG, headers=RAW)
            assert answer.status_code == 200
            answered += 1
            if not one_connection:
                await client.aclose()
                client = mutual.client(mutual.mine)
        await client.aclose()
        return answered

    async def over_grpc(one_connection: bool) -> int:
        answered = 0
        channel = mutual.channel(mutual.mine)
        while not ended.is_set():
            stub = dat_pb2_grpc.ClassifierServiceStub(channel)
            assert (await stub.Classify(message([JPEG]))).results
            answered += 1
            if not one_connection:
                await channel.close()
                channel = mutual.channel(mutual.mine)
        await channel.close()
        return answered

    asking = [
        asyncio.create_task(ask(one)) for ask in (over_http, over_grpc) for one in (True, False)
    ]
    seen = {first}
    for number in range(2):
        mutual.shown.replace(mutual.authority.issue(f"next-{number}"))
        await eventually(lambda: mutual.serial() not in seen)
        seen.add(mutual.serial())
    # A pair that does not belong together changes nothing.
    failures = "dat_security_reloads_total,kind=certificates,outcome=failed"
    before = mutual.server.metrics()[failures]
    key = mutual.shown.key.read_bytes()
    mutual.shown.key.write_bytes(mutual.mine.key.read_bytes())
    await eventually(lambda: mutual.server.metrics()[failures] == before + 1)
    assert mutual.serial() in seen
    mutual.shown.key.write_bytes(key)
    ended.set()
    assert all(await asyncio.gather(*asking))
    host, port = mutual.server.grpc_target.split(":")
    shown = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)), timeout=20)
    assert shown.strip() in mutual.shown.certificate.read_text()


def test_the_health_check_works_by_itself(mutual, keyed):
    files = {
        "DAT_SECURITY__TLS_CERTIFICATE": mutual.shown.certificate,
        "DAT_SECURITY__TLS_KEY": mutual.shown.key,
        "DAT_SECURITY__CLIENT_CA": mutual.authority.certificate,
    }
    here = {"DAT_SERVER__HOST": "0.0.0.0"}
    port = {"DAT_SERVER__HTTP_PORT": mutual.url.rsplit(":", 1)[1]}
    other = {"DAT_SERVER__HTTP_PORT": keyed.server.http_url.rsplit(":", 1)[1]}
    rpc = f"grpcs://{mutual.server.grpc_target}"
    ca = ("--ca", mutual.authority.certificate)
    own = ("--certificate", mutual.mine.certificate, "--key", mutual.mine.key)
    asked = [
        ((), files | here | port, 0),
        ((), {"DAT_SECURITY__API_KEYS": keyed.file} | here | other, 0),
        ((mutual.url, *ca), {}, 0),
        ((rpc, *ca, *own), {}, 0),
        ((mutual.url,), {}, 1),
    ]
    for (given, _, code), ended in zip(
        asked, run_all((("healthcheck", *given), own) for given, own, _ in asked), strict=True
    ):
        assert ended.returncode == code, (given, ended.stderr)


async def test_a_drain_over_tls_answers_what_is_in_flight_and_waits_for_no_idle_client(mutual):
    """Ends the server, and so is the last test of this file."""
    running, port = mutual.server, int(mutual.url.rsplit(":", 1)[1])
    with (
        socket.create_connection(("127.0.0.1", port), 20) as plain,
        mutual.trust(mutual.mine).wrap_socket(plain, server_hostname="localhost") as idle,
        socket.create_connection(("127.0.0.1", port), 20),  # and one in its handshake
    ):
        idle.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(12) == b"HTTP/1.1 200"
        async with mutual.client(mutual.mine) as client, mutual.channel(mutual.mine) as channel:
            stub = dat_pb2_grpc.ClassifierServiceStub(channel)
            await stub.Classify(message([JPEG]))
            files = {"files": [("file", ("a.jpg", JPEG))] * 32}
            over_http = [
                asyncio.create_task(client.post("/v1/classify", **files)) for _ in range(3)
            ]
            over_grpc = [stub.Classify(message([JPEG] * 32)) for _ in range(2)]
            waiting = "dat_requests_waiting,model=dat_nano"
            await eventually(lambda: running.metrics()[waiting] > 2 * 32)  # of three or more
            code = await asyncio.to_thread(running.terminate)
            answers = await asyncio.gather(*over_http)
            calls = await asyncio.gather(*(call.code() for call in over_grpc))
    assert code == 0
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert sum(answer.status_code == 200 for answer in answers) + calls.count(OK) >= 3
    assert set(calls) <= {OK, grpc.StatusCode.UNAVAILABLE}
