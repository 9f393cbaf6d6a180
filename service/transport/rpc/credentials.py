"""TLS of the gRPC port."""

import grpc

from service.security.certificates import Certificates
from service.security.security import Tls


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that ask for the newest certificates whenever a client connects.

    gRPC can ask all clients for a certificate, or none.
    """
    shown = tls.certificates

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        if shown is tls.certificates:
            return None
        shown = tls.certificates
        return _configuration(shown, needs_client=tls.needs_client)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown, needs_client=tls.needs_client),
        fetch,  # type: ignore[arg-type]  # the stubs do not know that none means no change
        require_client_authentication=tls.needs_client,
    )


def _configuration(
    certificates: Certificates, *, needs_client: bool
) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)],
        root_certificates=certificates.client_ca if needs_client else None,
    )
