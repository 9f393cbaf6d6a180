"""How does a connection over TLS begin and end?

It has its place, its limits and its time from its first byte, so that a client that never ends its
handshake is cut as one that never ends a head. asyncio would tell a server of a connection only
after the handshake, and would go on with the certificates that it was started with.
"""

import asyncio
import os
import socket
import ssl
import sys
from collections.abc import Callable
from fcntl import ioctl
from functools import partial
from termios import TIOCOUTQ
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import CertificateRequired
from service.security.security import Tls
from service.transport.http.connections.connection import Connection
from service.transport.http.probes import PROBES

_BYTES_ACKED = slice(120, 128)  # of Linux's struct tcp_info
_MORE_THAN_ANY = 2**64
_LATE_S = (
    3600.0  # of asyncio's own timeouts: `check` cuts before, and knows what a client still reads
)


def over_tls(tls: Tls) -> Callable[..., asyncio.Protocol]:
    """What makes connections, in the form that uvicorn wants."""
    return partial(_Accepted, tls)


class _Accepted(asyncio.Protocol):
    """A connection that was accepted; hands its socket over before anything is read from it."""

    def __init__(self, tls: Tls, **of_uvicorn: Any) -> None:
        self._tls = tls
        self._of_uvicorn = of_uvicorn

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        try:
            accepted = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError:  # no descriptor is left for it
            return
        finally:
            transport.abort()  # closes its own descriptor, and the connection with the last one
        accepted.setblocking(False)
        SecureConnection(self._tls, **self._of_uvicorn).shake_hands(accepted)


class SecureConnection(Connection):
    """One connection over TLS, with the certificates that are the newest when it begins."""

    def __init__(self, tls: Tls, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._tls = tls
        self._only_probes = False
        self._accepted: socket.socket
        self._closed_at: float | None = None  # when all was sent, loop time

    def shake_hands(self, accepted: socket.socket) -> None:
        """Find a place for the connection, and wait for the handshake."""
        self._accepted = accepted
        shaking = self.loop.create_task(
            self.loop.connect_accepted_socket(
                lambda: self,
                accepted,
                ssl=self._tls.certificates.context,
                ssl_handshake_timeout=_LATE_S,
                ssl_shutdown_timeout=_LATE_S,
            )
        )
        shaking.add_done_callback(self._shaken)
        super().connection_made(_Handshake(shaking))

    def _shaken(self, shaking: "asyncio.Task[Any]") -> None:
        failure = ConnectionAbortedError() if shaking.cancelled() else shaking.exception()
        if failure is None:
            return
        if isinstance(failure, ssl.SSLError):
            self.server_state.count_cut("handshake")
        self._accepted.close()
        if isinstance(self.transport, _Handshake):
            self.connection_lost(failure if isinstance(failure, Exception) else None)
        else:  # the handshake ended before the cut took effect; the transport tells of the end
            self.transport.abort()
        if not isinstance(failure, OSError):
            raise failure

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Go on with the head of the first request; the time for it has begun before."""
        HttpToolsProtocol.connection_made(self, transport)
        self._answer_over(transport)
        self._only_probes = self._tls.needs_client and not transport.get_extra_info("peercert")

    def check(self, now: float) -> None:
        """As for any connection; a client that does not say that it saw the end is not waited for.

        Args:
            now: loop time, seconds.
        """
        if not self.transport.is_closing() or self._pending():
            super().check(now)
            return
        if self._closed_at is None:
            self._closed_at = now
        if now - self._closed_at >= self.server_state.write_timeout_s:
            self.transport.abort()

    def _pending(self) -> int:
        # asyncio does not say what waits below TLS. While something does, the kernel has more to
        # send, and it knows how many bytes the client has taken since the connection began.
        descriptor = self._accepted.fileno()
        if descriptor < 0:  # closed just now
            return 0
        if not int.from_bytes(ioctl(descriptor, TIOCOUTQ, bytes(4)), sys.byteorder):
            return 0
        told = self._accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
        return _MORE_THAN_ANY - int.from_bytes(told[_BYTES_ACKED], sys.byteorder)

    def _check_head(self) -> None:
        super()._check_head()
        if self._only_probes and not self.url.startswith(PROBES):
            raise CertificateRequired(
                "this server needs a certificate of the client, signed by an authority it knows"
            )


class _Handshake(asyncio.Transport):
    """Stands for the transport until the handshake is over."""

    def __init__(self, shaking: "asyncio.Task[Any]") -> None:
        super().__init__()
        self._shaking = shaking

    def abort(self) -> None:
        self._shaking.cancel()

    def close(self) -> None:
        self._shaking.cancel()

    def is_closing(self) -> bool:
        return self._shaking.cancelling() > 0

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass
