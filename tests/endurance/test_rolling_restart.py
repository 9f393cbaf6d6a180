"""Two replicas behind a proxy are replaced one after the other, and nobody notices."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import httpx
import pytest

from service.pb import dat_pb2_grpc
from tests.clients import JPEG, message
from tests.server import ROOT, RunningServer, start_server

# A replica that starts answers UNAVAILABLE, which the proxy passes on: it looks at codes of HTTP.
# So callers over gRPC try again, as A6 of the proposals of gRPC has them do.
RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
# A replica that leaves answers until the proxy has seen it. What could not be sent to it is sent to
# the other one; so is, because to classify twice does no harm, what it did not answer.
CONFIG = """
daemon off;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
worker_processes 1;
events {{}}
http {{
    access_log off;
    client_max_body_size 32m;
    client_body_buffer_size 1m;
    proxy_max_temp_file_size 0;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    upstream http_replicas {{ {http} keepalive 16; }}
    upstream grpc_replicas {{ {grpc} keepalive 16; }}
    proxy_next_upstream error timeout http_503 http_429 non_idempotent;
    grpc_next_upstream error timeout http_503 http_429 non_idempotent;
    server {{
        listen 127.0.0.1:{http_port};
        location / {{
            proxy_pass http://http_replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
        }}
    }}
    server {{
        listen 127.0.0.1:{grpc_port} http2;
        location / {{ grpc_pass grpc://grpc_replicas; }}
    }}
}}
"""
DRAIN_DELAY_S = 2


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [one.getsockname()[1] for one in sockets]


def nginx() -> str:
    """The proxy; a machine may lack it, CI may not."""
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("nginx is not installed")
        pytest.skip("nginx is not installed (Debian: nginx-light)")
    return path


@contextmanager
def proxy(folder: Path, http: list[int], rpc: list[int]) -> Iterator[tuple[int, int]]:
    """nginx before replicas, and its ports."""
    http_port, grpc_port = free_ports(2)

    def servers(ports: list[int]) -> str:
        return " ".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;" for port in ports)

    config = folder / "nginx.conf"
    config.write_text(
        CONFIG.format(
            folder=folder,
            http=servers(http),
            grpc=servers(rpc),
            http_port=http_port,
            grpc_port=grpc_port,
        )
    )
    command = [nginx(), "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            yield http_port, grpc_port
        finally:
            process.terminate()


class Replica:
    """A server at ports that stay, which can be replaced."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.http, self.grpc = free_ports(2)
        self._settings = settings
        self._stack = ExitStack()
        self._server: RunningServer | None = None

    def start(self) -> None:
        starting = start_server(
            ("service",),
            DAT_MODEL__NAME="dat_nano",
            DAT_ENGINE__THREADS=1,
            DAT_SERVER__HTTP_PORT=self.http,
            DAT_SERVER__GRPC_PORT=self.grpc,
            DAT_SERVER__DRAIN_DELAY_S=DRAIN_DELAY_S,
            DAT_LIMITS__DEFAULT_TIMEOUT_S=100,
            **self._settings,
        )
        self._server = self._stack.enter_context(starting)

    def replace(self) -> None:
        assert self._server is not None
        self._server.process.terminate()
        assert self._server.process.wait(60) == 0
        self.start()

    def end(self) -> None:
        self._stack.close()


@pytest.mark.timeout(600)
async def test_replicas_are_replaced_one_after_the_other_and_nobody_notices(
    tmp_path, shape, figures
):
    told: Counter[str] = Counter()
    over = asyncio.Event()

    async def ask_http(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=100) as client:
            while not over.is_set():
                headers = {"content-type": "image/jpeg"}
                try:
                    answer = await client.post("/v1/classify", content=JPEG, headers=headers)
                except httpx.TransportError as error:
                    told[f"http {error!r}"] += 1
                else:
                    told[f"http {answer.status_code}"] += 1

    async def ask_grpc(port: int) -> None:
        options = [("grpc.service_config", json.dumps(RETRIES))]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as connection:
            stub = dat_pb2_grpc.ClassifierServiceStub(connection)
            while not over.is_set():
                try:
                    await stub.Classify(message([JPEG]))
                except grpc.aio.AioRpcError as error:
                    told[f"grpc {error.code().name}: {error.details()}"] += 1
                else:
                    told["grpc ok"] += 1

    replicas = [Replica(shape), Replica(shape)]
    try:
        for replica in replicas:
            await asyncio.to_thread(replica.start)
        with proxy(tmp_path, [r.http for r in replicas], [r.grpc for r in replicas]) as ports:
            await asyncio.sleep(1)
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(ask_http(ports[0]))
                    group.create_task(ask_grpc(ports[1]))
                for replica in replicas:
                    before = told.total()
                    await asyncio.to_thread(replica.replace)
                    await asyncio.sleep(2)
                    assert told.total() > before
                over.set()
        figures(told=dict(told))
        assert set(told) == {"http 200", "grpc ok"}
    finally:
        for replica in replicas:
            replica.end()
