"""Asks a server whether it is ready, here or elsewhere, without a proxy between."""

import http.client
import ssl
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from urllib.parse import SplitResult, urlsplit

from service import process
from service.command_errors import CommandError
from service.settings.server import Server


class HealthcheckError(CommandError):
    """The server is not ready, or could not be asked; the message says which."""


def address(server: Server, *, tls: bool = False) -> str:
    """Where a server with these settings answers on its own machine.

    Args:
        server: the settings.
        tls: whether they have a certificate.

    Raises:
        HealthcheckError: the port is not known.
    """
    if server.http_port == 0:
        raise HealthcheckError("DAT_SERVER__HTTP_PORT is 0, which picks a free port: give the URL")
    host = server.host
    try:
        given = ip_address(host)
    except ValueError:  # a name
        pass
    else:
        if given.is_unspecified:
            host = "127.0.0.1" if given.version == 4 else "::1"
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{server.http_port}"


@dataclass(frozen=True)
class Trust:
    """What certificates have to do with it.

    Attributes:
        authorities: certificates (PEM) that the server's is checked against instead of those of
            the system.
        certificate: of the client (PEM), for gRPC servers that ask for one.
        key: of that certificate; `None` means that the same file holds it.
        blind: whether the server's is not checked.
    """

    authorities: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    blind: bool = False


def ask(url: str, *, timeout_s: float, trust: Trust = Trust()) -> None:
    """Return when the server is ready.

    Args:
        url: `http`, `https`, `grpc` or `grpcs`; of the first two without a path, `/health/ready`
            is asked.
        timeout_s: for all of it, seconds.
        trust: for `https` and `grpcs`.

    Raises:
        HealthcheckError: it is not ready, or could not be asked.
    """
    try:
        where = urlsplit(url)
        port = where.port
    except ValueError as fault:
        raise HealthcheckError(f"{url}: {fault}") from fault
    asks = {"http": _ask_http, "https": _ask_http, "grpc": _ask_grpc, "grpcs": _ask_grpc}
    if where.scheme not in asks or not where.hostname:
        raise HealthcheckError(f"{url}: expected http://, https://, grpc:// or grpcs:// and a host")
    if where.scheme.startswith("grpc") and (port is None or where.path not in ("", "/")):
        raise HealthcheckError(f"{url}: expected {where.scheme}://host:port")
    faults: list[Exception] = []

    def run() -> None:
        try:
            asks[where.scheme](where, timeout_s, trust)
        except (OSError, http.client.HTTPException, ValueError, HealthcheckError) as error:
            faults.append(error)

    # A socket counts its timeout from each byte anew, and looking up a name has none.
    asking = Thread(target=run, daemon=True)
    asking.start()
    asking.join(timeout_s)
    if asking.is_alive():
        raise HealthcheckError(f"{url}: no answer within {timeout_s:g} s")
    for error in faults:
        raise HealthcheckError(f"{url}: {str(error) or type(error).__name__}") from error


def _ask_http(where: SplitResult, timeout_s: float, trust: Trust) -> None:
    assert where.hostname
    connection: http.client.HTTPConnection
    if where.scheme == "https":
        connection = http.client.HTTPSConnection(
            where.hostname,
            where.port or 443,
            timeout=timeout_s,
            context=_context(trust),
        )
    else:
        connection = http.client.HTTPConnection(where.hostname, where.port or 80, timeout=timeout_s)
    path = where.path if where.path not in ("", "/") else "/health/ready"
    with closing(connection):
        connection.request("GET", f"{path}?{where.query}" if where.query else path)
        status = connection.getresponse().status
    if status != http.client.OK:
        raise HealthcheckError(f"not ready: {path} answers {status}")


def _context(trust: Trust) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=trust.authorities)
    if trust.blind:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if trust.certificate is not None:
        context.load_cert_chain(trust.certificate, trust.key)
    return context


def _ask_grpc(where: SplitResult, timeout_s: float, trust: Trust) -> None:
    process.silence_grpc()
    # Imported here: it takes a tenth of a second, which a check over HTTP need not wait for.
    import grpc  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

    target = where.netloc.rpartition("@")[2]
    options = [("grpc.enable_http_proxy", 0)]
    if where.scheme == "grpcs":
        key = trust.key or trust.certificate
        files = (trust.authorities, key, trust.certificate)
        credentials = grpc.ssl_channel_credentials(
            *(None if file is None else file.read_bytes() for file in files)
        )
        channel = grpc.secure_channel(target, credentials, options)
    else:
        channel = grpc.insecure_channel(target, options)
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=timeout_s
        )
    except grpc.RpcError as error:
        raise HealthcheckError(f"{error.code().name}: {error.details()}") from error
    finally:
        channel.close()
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise HealthcheckError(f"not ready: grpc.health.v1 answers {status}")
