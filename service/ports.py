"""The three ports, opened before anything that takes long: a taken one fails at once."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.command_errors import StartupError
from service.settings import Server

_BACKLOG = 2048


@dataclass(frozen=True)
class Ports:
    """The sockets that listen already.

    Attributes:
        http: of the interface.
        metrics: of the metrics.
    """

    http: socket.socket
    metrics: socket.socket


@contextmanager
def open_ports(server: Server) -> Iterator[Ports]:
    """Listen to HTTP and metrics, and see that gRPC, which opens its own port, will find it free.

    Raises:
        StartupError: a port is taken, this user may not use it, or the host is not an address of
            this machine.
    """
    with (
        _listen("HTTP", server.host, server.http_port) as http,
        _listen("metrics", server.host, server.metrics_port) as metrics,
    ):
        _listen("gRPC", server.host, server.grpc_port).close()
        yield Ports(http, metrics)


def _listen(name: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        raise StartupError(
            f"{name} cannot use port {port} of {host}: {error}; change DAT_SERVER__HOST or "
            f"DAT_SERVER__{name.upper()}_PORT"
        ) from error
