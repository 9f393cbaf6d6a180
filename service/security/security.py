"""The security of a server: its keys and certificates, kept up to date."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from service.metrics.replica import Metrics
from service.security.access import Access
from service.security.certificates import Certificates, files, read_certificates
from service.security.keys import read_keys
from service.security.reloading import Reloading
from service.settings.security import Security as Settings


@dataclass(frozen=True)
class Tls:
    """TLS of both transports.

    Attributes:
        needs_client: whether a client has to have a certificate.
    """

    needs_client: bool
    _certificates: Reloading[Certificates]

    @property
    def certificates(self) -> Certificates:
        """Those for new connections."""
        return self._certificates.value


@dataclass(frozen=True)
class Security:
    """What the transports ask.

    Attributes:
        access: who may ask.
        tls: of the connections; `None` means plain text.
    """

    access: Access
    tls: Tls | None


@asynccontextmanager
async def open_security(
    settings: Settings, metrics: Metrics, share: float = 1.0
) -> AsyncIterator[Security]:
    """Read the keys and the certificates, and read them again whenever they change.

    Args:
        settings: where they are.
        metrics: of the replica.
        share: as in `Access`.

    Raises:
        StartupError: the files cannot be used.
    """
    access, tls = Access(metrics, share), None
    watched: list[Reloading[Any]] = []
    if settings.api_keys is not None:
        path = settings.api_keys
        keys = Reloading("keys", [path], partial(read_keys, path), access.take, metrics)
        watched.append(keys)
    if settings.tls_certificate is not None:

        def show(certificates: Certificates) -> None:
            metrics.certificate_expiry.set(certificates.expires)

        read = partial(read_certificates, settings)
        certificates = Reloading("certificates", files(settings), read, show, metrics)
        tls = Tls(settings.needs_client_certificate, certificates)
        watched.append(certificates)
    watching = [asyncio.create_task(one.watch()) for one in watched]
    try:
        yield Security(access, tls)
    finally:
        for task in watching:
            task.cancel()
