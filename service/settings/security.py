"""Who may ask, and over which connections."""

from pathlib import Path

from pydantic import Field, model_validator

from service.settings.group import Group


class Security(Group):
    """API keys and TLS; `docs/security.md` says how they work together."""

    api_keys: Path | None = Field(
        None,
        description="Key file (TOML) of `dat-serve key`: every request but those of probes needs "
        "one of its keys. Read again when it changes.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="Certificate of the server and those between it and its authority (PEM): HTTP "
        "and gRPC over TLS, metrics not. Read again when it changes, as are the two below.",
    )
    tls_key: Path | None = Field(
        None,
        description="Private key of the certificate (PEM); without it, the file of the "
        "certificate holds it too.",
    )
    client_ca: Path | None = Field(
        None,
        description="Certificates of the authorities (PEM) that sign those of clients: clients "
        "have to show one (mTLS), but HTTP's probes need none.",
    )
    require_client_certificate: bool = Field(
        True,
        description="`false`: HTTP checks the certificate of a client that has one, and gRPC asks "
        "for none.",
    )

    @property
    def needs_client_certificate(self) -> bool:
        """Whether a client has to have a certificate."""
        return self.client_ca is not None and self.require_client_certificate

    @model_validator(mode="after")
    def _consistent(self) -> "Security":
        for field in ("tls_key", "client_ca"):
            if getattr(self, field) is not None and self.tls_certificate is None:
                raise ValueError(f"{field} needs tls_certificate")
        asked = "require_client_certificate" in self.model_fields_set
        if asked and self.require_client_certificate and self.client_ca is None:
            raise ValueError("require_client_certificate needs client_ca, which signs them")
        return self
