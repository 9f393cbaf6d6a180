"""HTTP connections over TLS.

A connection has its place, its limits and its time from its first byte, so that a client that never
ends its handshake is cut as one that never ends a head. asyncio would tell a server of a
connection only after the handshake, and goes on with the certificates that it was started with.
"""

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import CertificateRequired
from service.security.security import Tls
from service.transport.http.connections import PROBES, Connection, Connections

_CLOSE_S = 2.0  # for the client to say that it has seen the end


def over_tls(tls: Tls) -> Callable[..., "SecureConnection"]:
    """What makes connections, in the form that uvicorn wants."""
    return partial(SecureConnection, tls=tls)


class SecureConnection(Connection):
    """One connection over TLS, with the certificates that are the newest when it begins."""

    def __init__(
        self,
        config: Config,
        server_state: Connections,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        tls: Tls,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._tls = tls
        self._for_probes_only = False
        self._handshake: asyncio.Task[None]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find a place for the connection, and shake hands."""
        super().connection_made(transport)
        transport.pause_reading()  # until TLS does that
        self._handshake = self.loop.create_task(self._shake_hands(transport))

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        early = _Early()
        try:
            secure = await self.loop.start_tls(
                transport,
                early,
                self._tls.certificates.context,
                server_side=True,
                ssl_handshake_timeout=self._limits.header_timeout_s,
                ssl_shutdown_timeout=_CLOSE_S,
            )
        except OSError as error:  # those of TLS as well
            if isinstance(error, ssl.SSLError):
                self.server_state.count_cut("handshake")
            self.connection_lost(error)
            return
        assert isinstance(secure, asyncio.Transport)
        HttpToolsProtocol.connection_made(self, secure)
        self._answer_over(secure)
        shown = secure.get_extra_info("peercert")
        self._for_probes_only = self._tls.needs_client and not shown
        secure.set_protocol(self)
        for data in early.received:
            self.data_received(data)
        if early.lost:
            self.connection_lost(early.cause)

    def _check_head(self) -> None:
        super()._check_head()
        if self._for_probes_only and not self.url.startswith(PROBES):
            raise CertificateRequired(
                "this server needs a certificate of the client, signed by an authority it knows"
            )


class _Early(asyncio.Protocol):
    """Keeps what comes between the end of the handshake and the time when that is known."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.lost = False
        self.cause: Exception | None = None

    def data_received(self, data: bytes) -> None:
        self.received.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.cause = True, exc
