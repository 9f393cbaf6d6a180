"""The three ports, opened before anything that takes long: a taken one fails at once."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from service.command_errors import StartupError
from service.settings.server import Server

_BACKLOG = 2048


@dataclass(frozen=True)
class Ports:
    """The sockets that listen already, and the port that gRPC will listen to.

    Attributes:
        http: of the interface; `None` where connections are handed over by another process.
        grpc: the number of the port; 0 for any that is free.
        shared: whether several processes listen to that port.
    """

    http: socket.socket | None
    grpc: int
    shared: bool = False


@contextmanager
def open_ports(server: Server) -> Iterator[tuple[Ports, socket.socket]]:
    """Listen to HTTP and metrics, and see that gRPC, which opens its own port, will find it free.

    Returns:
        The ports of the interfaces, and that of the metrics.

    Raises:
        StartupError: a port is taken, this user may not use it, or the host is not an address of
            this machine.
    """
    with (
        _listen("HTTP", server.host, server.http_port) as http,
        _listen("metrics", server.host, server.metrics_port) as metrics,
    ):
        _listen("gRPC", server.host, server.grpc_port).close()
        yield Ports(http, server.grpc_port), metrics


@contextmanager
def reserve_grpc(server: Server) -> Iterator[int]:
    """Keep a port for the gRPC servers of several processes, and give its number.

    A socket that is bound and does not listen gets no connections; those that share its port do.

    Raises:
        StartupError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with ExitStack() as reserved:
        kept = reserved.enter_context(socket.socket(family))
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            kept.bind((server.host, server.grpc_port))
        except OSError as error:
            raise _taken("gRPC", server.host, server.grpc_port, error) from error
        port: int = kept.getsockname()[1]
        if server.host == "0.0.0.0":  # noqa: S104
            # gRPC takes this for all addresses of IPv6 too, unless those are taken.
            with suppress(OSError):  # without IPv6 there are none
                others = reserved.enter_context(socket.socket(socket.AF_INET6))
                others.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                others.bind(("::", port))
        yield port


def _listen(name: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(
            (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=host == "::"
        )
    except OSError as error:
        raise _taken(name, host, port, error) from error


def _taken(name: str, host: str, port: int, error: OSError) -> StartupError:
    return StartupError(
        f"{name} cannot use port {port} of {host}: {error}; change DAT_SERVER__HOST or "
        f"DAT_SERVER__{name.upper()}_PORT"
    )
