"""Authorities and certificates for tests, made with OpenSSL's command."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from random import randrange

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in two files."""

    certificate: Path
    key: Path

    @property
    def files(self) -> tuple[str, str]:
        return str(self.certificate), str(self.key)

    def replace(self, other: "Pair") -> None:
        """Write another pair into the files of this one, one after the other."""
        self.certificate.write_bytes(other.certificate.read_bytes())
        self.key.write_bytes(other.key.read_bytes())


class Authority:
    """Signs certificates of this machine; with negative days what it makes has expired.

    Args:
        folder: where the files are made.
        name: of the authority.
        days: that its own certificate is valid.
    """

    def __init__(self, folder: Path, name: str = "authority", *, days: int = 1) -> None:
        self._folder = folder
        self._name = name
        self._own = self._request(name, "basicConstraints=critical,CA:TRUE")
        self._sign(self._own, days, "-signkey", self._own.key)

    @property
    def certificate(self) -> Path:
        return self._own.certificate

    def issue(self, name: str, *, days: int = 1, usage: str = "serverAuth,clientAuth") -> Pair:
        """A certificate."""
        pair = self._request(
            f"{self._name}-{name}",
            "basicConstraints=critical,CA:FALSE",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            f"extendedKeyUsage={usage}",
        )
        self._sign(pair, days, "-CA", self._own.certificate, "-CAkey", self._own.key)
        return pair

    def _request(self, name: str, *extensions: str) -> Pair:
        pair = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        given = [part for extension in extensions for part in ("-addext", extension)]
        files = ("-keyout", pair.key, "-out", pair.certificate)
        openssl("req", *_KEY, "-subj", f"/CN={name}", *given, *files)
        return pair

    def _sign(self, pair: Pair, days: int, *by: object) -> None:
        file = pair.certificate
        serial = ("-set_serial", randrange(1, 2**64), "-days", days, "-copy_extensions", "copy")
        openssl("x509", "-req", "-in", file, *by, *serial, "-out", file)


def openssl(*arguments: object) -> None:
    """Run OpenSSL's command, or skip the test where there is none."""
    command = shutil.which("openssl")
    if command is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run([command, *map(str, arguments)], check=True, capture_output=True)
