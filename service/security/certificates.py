"""The certificates of TLS: read from their files, and tried before anybody sees them."""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, NoReturn

from service.command_errors import StartupError
from service.settings.environment import PREFIX
from service.settings.security import Security

# Of TLS 1.2; both have forward secrecy and authenticate what they encrypt. TLS 1.3 has no others.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_ROUNDS = 10  # messages of a handshake in memory, and then some


class CertificateError(StartupError):
    """Certificates that cannot be used; the message names the setting, the file and the reason."""


@dataclass(frozen=True)
class Certificates:
    """What a server shows its clients, and what it asks of them.

    Attributes:
        context: of new HTTP connections; it checks the certificate of a client that sends one.
        chain: of the server, PEM.
        key: of the server, PEM.
        client_ca: PEM of those who sign the certificates of clients; `None` if none are asked for.
        expires: when the server's own certificate does, seconds since 1970.
    """

    context: ssl.SSLContext
    chain: bytes
    key: bytes
    client_ca: bytes | None
    expires: float


def files(security: Security) -> Sequence[Path]:
    """The files that certificates are read from."""
    named = (security.tls_certificate, security.tls_key, security.client_ca)
    return [path for path in named if path is not None]


def read_certificates(security: Security) -> Certificates:
    """Read the certificates of the settings, which have some, and try them.

    Raises:
        CertificateError: a file is missing or holds something else, the key is that of another
            certificate, or the certificate is not valid now or not for a server.
    """
    assert security.tls_certificate is not None
    certificate = _File("TLS_CERTIFICATE", security.tls_certificate)
    key = certificate if security.tls_key is None else _File("TLS_KEY", security.tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    certificate.check_certificates()
    _load_pair(context, certificate, key)
    expires = _try(context, certificate)
    if security.client_ca is None:
        client_ca = None
    else:
        client_ca = _File("CLIENT_CA", security.client_ca)
        _load_authorities(context, client_ca)
    return Certificates(
        context,
        certificate.data,
        key.data,
        None if client_ca is None else client_ca.data,
        expires,
    )


class _File:
    """A file of the settings, and what it holds.

    Raises:
        CertificateError: it cannot be read.
    """

    def __init__(self, setting: str, path: Path) -> None:
        self.path = path
        self._named = f"{PREFIX}SECURITY__{setting}: {path}"
        try:
            if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
                self.fail("not a file")
            self.data = path.read_bytes()
        except OSError as fault:
            self.fail(fault.strerror or str(fault))

    def check_certificates(self) -> None:
        """See that the file holds certificates."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=self.text)
        except (ssl.SSLError, ValueError):
            self.fail("holds no certificate in PEM that can be read")

    @property
    def text(self) -> str:
        """The same as text: PEM is ASCII, and so is all that is read of it."""
        return self.data.decode("ascii", "ignore")

    def fail(self, reason: str) -> NoReturn:
        raise CertificateError(f"{self._named}: {reason}") from None


def _load_pair(context: ssl.SSLContext, certificate: _File, key: _File) -> None:
    def refuse() -> str:
        key.fail("the key is encrypted, and nobody is there to give its password")

    try:
        context.load_cert_chain(certificate.path, key.path, refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            key.fail(f"this is not the key of the certificate in {certificate.path}")
        if error.reason in ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK"):
            certificate.fail(f"too weak ({error.reason})")
        key.fail("holds no private key in PEM that can be read")
    except OSError as fault:  # the file went away meanwhile
        key.fail(fault.strerror or str(fault))


def _load_authorities(context: ssl.SSLContext, authorities: _File) -> None:
    authorities.check_certificates()
    context.load_verify_locations(cadata=authorities.text)
    known = context.get_ca_certs()
    if not known:
        authorities.fail("holds no certificate of an authority, which may sign others")
    if all(_expires(one) <= time() for one in known):
        authorities.fail("certificate has expired")
    context.verify_mode = ssl.CERT_OPTIONAL


def _try(context: ssl.SSLContext, certificate: _File) -> float:
    """Shake hands in memory with a client that trusts this certificate alone; when it expires."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(cadata=certificate.text)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = trusting.wrap_bio(to_client, to_server)
    try:
        for _ in range(_ROUNDS):
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        certificate.fail(error.verify_message)
    except ssl.SSLError as error:
        certificate.fail(f"no client can use this certificate: {error.reason}")
    shown = client.getpeercert()
    assert shown, "the handshake is over"
    return _expires(shown)


def _expires(certificate: dict[str, Any]) -> float:
    return float(ssl.cert_time_to_seconds(certificate["notAfter"]))
