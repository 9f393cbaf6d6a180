"""What the server needs of its machine, checked before torch is loaded."""

import socket
from pathlib import Path
from tempfile import TemporaryFile

from service.command_errors import StartupError
from service.security.certificates import read_certificates
from service.security.keys import read_keys
from service.settings.environment import PREFIX
from service.settings.security import Security
from service.settings.settings import Settings


class PreconditionError(StartupError):
    """Something is missing; the message names the variable and what it needs."""


def require(settings: Settings) -> None:
    """Check the host, the folders, the keys and the certificates of the settings.

    Raises:
        PreconditionError: the host has no address, or a folder cannot be written to.
        StartupError: keys or certificates cannot be used.
    """
    _require_security(settings.security)
    _require_address(settings.server.host)
    if settings.engine.cache is not None:
        _require_folder(settings.engine.cache)


def _require_security(security: Security) -> None:
    if security.api_keys is not None:
        read_keys(security.api_keys, f"{PREFIX}SECURITY__API_KEYS: ")
    if security.tls_certificate is not None:
        read_certificates(security)


def _require_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as fault:  # the second for what cannot be a name at all
        raise PreconditionError(
            f"DAT_SERVER__HOST: {host!r} is neither an address nor a name that this machine knows: "
            f"{fault}"
        ) from fault


def _require_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as fault:
        raise PreconditionError(
            f"DAT_ENGINE__CACHE: {folder}: {fault.strerror}; it must be a folder that the server "
            "can write to"
        ) from fault
