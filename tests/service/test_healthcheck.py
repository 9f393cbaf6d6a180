"""`dat-serve healthcheck` asks the server itself, and says in one line what is wrong."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service import cli, healthcheck
from service.settings.server import Server
from tests.server import ROOT
from tests.service.commands import run

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the command in this process; its exit code and the lines that it wrote."""

    def check(*arguments):
        monkeypatch.setattr(sys, "argv", ["dat-serve", "healthcheck", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err.splitlines()

    return check


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate of this machine in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", key, "-out", file),
        ],
        check=True,
        capture_output=True,
    )
    return key, file


@contextmanager
def answering(answers, context=None):
    """The URL of a server that answers paths with a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(status, credentials=None):
    """The URL of a gRPC server with this health."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        servicer = health.HealthServicer()
        servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield f"{'grpc' if credentials is None else 'grpcs'}://127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_a_ready_server_is_asked_past_every_proxy(server):
    port = server.http_url.rsplit(":", 1)[1]
    nowhere = dict.fromkeys(
        ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "grpc_proxy"), "http://127.0.0.1:9"
    )
    asked = [
        ((), {"DAT_SERVER__HTTP_PORT": port, "DAT_SERVER__HOST": "0.0.0.0"}),
        ((server.http_url,), {}),
        ((f"{server.http_url}/health/live",), {}),
        ((f"grpc://{server.grpc_target}",), {}),
    ]
    for given, own in asked:
        ended = run("healthcheck", *given, **nowhere, **own)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("0:0:0:0:0:0:0:0", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("127.0.0.2", "http://127.0.0.2:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_server_here_is_asked_where_it_listens(host, url):
    assert healthcheck.address(Server(host=host)) == url


def test_a_port_that_only_the_server_knows_has_to_be_given(check, monkeypatch):
    monkeypatch.setenv("DAT_SERVER__HTTP_PORT", "0")
    code, (line,) = check()
    assert code == 1
    assert "DAT_SERVER__HTTP_PORT is 0" in line


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
        "http://x:y",
        "grpc://x",
        "grpc://x:1/y",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_said_to_be_none(check, url):
    code, (line,) = check(url)
    assert code == 1
    assert line.startswith(f"dat-serve: {url}: ")


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
def test_where_nothing_listens_nothing_is_ready(check, scheme):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    code, (line,) = check(f"{scheme}://127.0.0.1:{port}", "--timeout", 10)
    assert code == 1
    assert "refused" in line


@pytest.mark.parametrize("scheme", ["http", "https", "grpc", "grpcs"])
def test_a_server_that_says_nothing_is_not_waited_for(check, scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code, (line,) = check(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}", "--timeout", 0.3)
    assert code == 1
    assert line.startswith(f"dat-serve: {scheme}://")


def test_a_server_that_speaks_for_ever_is_not_listened_to(check):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = threading.Event()

        def drip():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not ended.wait(0.05):
                    connection.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        code, (line,) = check(f"http://127.0.0.1:{listener.getsockname()[1]}", "--timeout", 0.3)
        ended.set()
        thread.join()
    assert code == 1
    assert line.endswith("no answer within 0.3 s")


def test_another_answer_than_ready_is_told(check):
    with answering({"/health/ready": 503, "/moved": 307, "/up": 200}) as url:
        assert check(url)[0] == 1
        assert check(f"{url}/")[1][0].endswith("not ready: /health/ready answers 503")
        assert check(f"{url}/moved")[1][0].endswith("not ready: /moved answers 307")
        assert check(f"{url}/up?why") == (
            1,
            [f"dat-serve: {url}/up?why: not ready: /up answers 404"],
        )
        assert check(f"{url}/up") == (0, [])
    with serving(NOT_SERVING) as url:
        assert check(url)[1][0].endswith("not ready: grpc.health.v1 answers NOT_SERVING")


def test_certificates_are_checked_against_those_of_the_system_or_a_file(check, certificate):
    key, file = certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file, key)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), file.read_bytes())])
    with (
        answering({"/health/ready": 200}, context) as https,
        serving(SERVING, credentials) as grpcs,
    ):
        for url in (https, grpcs):
            assert check(url, "--ca", file) == (0, [])
            ended = run("healthcheck", url)  # libraries write to its standard error too
            (line,) = ended.stderr.splitlines()
            assert ended.returncode == 1
            assert "certificate" in line.lower()
            code, (line,) = check(url, "--ca", "/nowhere.pem")
            assert code == 1
            assert "No such file" in line


def test_the_command_loads_neither_torch_nor_grpc():
    asked = (
        "import sys, service.cli; print({'torch', 'grpc', 'uvloop', 'numpy'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert loaded.stdout == "set()\n"
    assert run("healthcheck", "--timeout", "nan").returncode == 2
