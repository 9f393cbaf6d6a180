"""Certificates that nobody could use are found before the server starts, and named."""

import os
import ssl
from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from service.security.certificates import CertificateError, read_certificates
from service.settings.security import Security
from tests.certificates import Authority, Pair, openssl
from tests.service.commands import run_all


@dataclass
class Made:
    authority: Authority
    other: Authority
    server: Pair
    expired: Pair


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    authority = Authority(folder)
    return Made(
        authority,
        Authority(folder, "other"),
        authority.issue("server"),
        authority.issue("expired", days=-1),
    )


def settings(pair, **others):
    return Security(tls_certificate=pair.certificate, tls_key=pair.key, **others)


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """The server's side after a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname="localhost"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(5):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return sides[1]


def test_what_is_good_is_taken_and_its_end_is_known(made, tmp_path):
    certificates = read_certificates(settings(made.server, client_ca=made.authority.certificate))
    assert 0 < certificates.expires - made.server.certificate.stat().st_mtime < 2 * 86_400
    both = tmp_path / "both.pem"
    both.write_bytes(made.server.key.read_bytes() + made.server.certificate.read_bytes())
    assert read_certificates(Security(tls_certificate=both)).client_ca is None


def test_old_versions_and_ciphers_are_not_spoken(made):
    certificates = read_certificates(settings(made.server))
    for cipher in certificates.context.get_ciphers():
        assert "ECDHE" in cipher["name"] or cipher["protocol"] == "TLSv1.3"
        assert cipher["aead"]
    for version, spoken in [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)]:
        client = ssl.create_default_context(cafile=made.authority.certificate)
        client.set_ciphers("DEFAULT:@SECLEVEL=0")
        with nullcontext() if spoken else pytest.warns(DeprecationWarning, match="TLSv1_1"):
            client.minimum_version = client.maximum_version = version
        if spoken:
            assert shake_hands(certificates.context, client).version() == "TLSv1.2"
        else:
            with pytest.raises(ssl.SSLError):
                shake_hands(certificates.context, client)


def test_a_client_is_known_by_who_signed_its_certificate(made):
    certificates = read_certificates(settings(made.server, client_ca=made.authority.certificate))
    for authority, known in [(made.authority, True), (made.other, False)]:
        client = ssl.create_default_context(cafile=made.authority.certificate)
        client.load_cert_chain(*authority.issue("client").files)
        if known:
            assert shake_hands(certificates.context, client).getpeercert()
        else:
            with pytest.raises(ssl.SSLError):
                shake_hands(certificates.context, client)


FAULTS = [
    "expired", "mismatch", "encrypted", "no key", "no certificate", "weak", "client only",
    "missing", "folder", "binary", "no authority", "leaf as authority", "expired authority",
]  # fmt: skip


def faulty(fault, made, folder):  # noqa: PLR0911, PLR0912
    """Settings with a fault, the file at fault, and a word of the message."""
    server, empty, extra = made.server, folder / "empty.pem", folder / "extra.pem"
    empty.write_text("nothing here\n")
    match fault:
        case "expired":
            return settings(made.expired), made.expired.certificate, "expired"
        case "mismatch":
            wrong = Pair(server.certificate, made.expired.key)
            return settings(wrong), wrong.key, "not the key of the certificate"
        case "encrypted":
            openssl("ec", "-in", server.key, "-aes128", "-passout", "pass:x", "-out", extra)
            return settings(Pair(server.certificate, extra)), extra, "encrypted"
        case "no key":
            return settings(Pair(server.certificate, empty)), empty, "no private key"
        case "no certificate":
            return settings(Pair(server.key, server.key)), server.key, "no certificate"
        case "weak":
            key = folder / "weak.key"
            small = ("req", "-x509", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=a")
            openssl(*small, "-keyout", key, "-out", extra)
            return settings(Pair(extra, key)), extra, "too weak"
        case "client only":
            pair = made.authority.issue("client-only", usage="clientAuth")
            return settings(pair), pair.certificate, "purpose"
        case "missing":
            return settings(Pair(folder / "nowhere", server.key)), folder / "nowhere", "No such"
        case "folder":
            return settings(Pair(server.certificate, folder)), folder, "not a file"
        case "binary":
            extra.write_bytes(os.urandom(1000))
            return settings(Pair(extra, server.key)), extra, "no certificate"
        case "no authority":
            return settings(server, client_ca=empty), empty, "no certificate"
        case "leaf as authority":
            leaf = server.certificate
            return settings(server, client_ca=leaf), leaf, "no certificate of an authority"
        case "expired authority":
            old = Authority(folder, "old", days=-1).certificate
            return settings(server, client_ca=old), old, "expired"
    raise AssertionError(fault)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_nobody_could_use_is_refused_and_named(fault, made, tmp_path):
    given, file, word = faulty(fault, made, tmp_path)
    with pytest.raises(CertificateError) as refused:
        read_certificates(given)
    message = str(refused.value)
    assert str(file) in message
    assert word in message
    assert message.startswith("DAT_SECURITY__")
    assert "\n" not in message


def test_the_server_does_not_start_with_it(made, tmp_path):
    commands = []
    for fault in ("expired", "mismatch"):
        (tmp_path / fault).mkdir()
        given, _, _ = faulty(fault, made, tmp_path / fault)
        chosen = given.model_dump(exclude_none=True, exclude={"require_client_certificate"})
        commands.append(((), {f"DAT_SECURITY__{n}".upper(): v for n, v in chosen.items()}))
    commands.append(((), {"DAT_SECURITY__TLS_KEY": made.server.key}))
    commands.append(((), {"DAT_SECURITY__API_KEYS": made.server.key}))
    for (_, given), ended in zip(commands, run_all(commands), strict=True):
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 1
        assert line.startswith("dat-serve: DAT_SECURITY")
        assert any(str(path) in line for path in given.values()) or "tls_key needs" in line
        assert ended.stdout == ""
