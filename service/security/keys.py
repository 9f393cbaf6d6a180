"""API keys: a file of their hashes, how a key is made, and whose a key is.

A key is 256 random bits, so that nobody finds it by trying, with or without the file of hashes. One
round of SHA-256 is enough for such a key; the slow hashes of passwords make up for what people can
remember, and would cost every request a tenth of a second.
"""

import fcntl
import os
import tomllib
from collections.abc import Sequence
from hashlib import blake2b, sha256
from hmac import compare_digest
from json import dumps
from pathlib import Path
from secrets import token_bytes, token_urlsafe
from typing import Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from service.command_errors import StartupError
from service.text_file import first_fault, parse_text, read_text

_PREFIX = "dat_"  # by which scanners for secrets find a key that was published by mistake
_RANDOM_BYTES = 32
_FEWEST_BYTES = 32  # 128 bits even in hexadecimal: what is shorter was thought up by somebody
_MOST_BYTES = 256
_MOST_KEYS = 4096  # each has its series in the metrics


class KeyFileError(StartupError):
    """A key file that cannot be used; the message names the file and the reason."""


class Key(BaseModel, frozen=True, extra="forbid"):
    """What is known of a key.

    Attributes:
        name: of the key, in the log and in the metrics.
        sha256: of the key, hexadecimal.
        images_per_s: that it may ask for, on average; `None` means any number.
        burst: images that it may ask for at once; `None` means those of a second.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    sha256: str = Field(pattern=r"^[0-9a-fA-F]{64}$")
    images_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    burst: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.burst is not None and self.images_per_s is None:
            raise ValueError("burst needs images_per_s")
        return self


class _KeyFile(BaseModel, extra="forbid"):
    key: tuple[Key, ...] = Field((), max_length=_MOST_KEYS)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        for field in ("name", "sha256"):
            values = [getattr(key, field).lower() for key in self.key]
            if len(set(values)) < len(values):
                twice = next(
                    key.name for key in self.key if values.count(getattr(key, field).lower()) > 1
                )
                raise ValueError(f"two keys have the {field} of {twice!r}")
        return self


class Keyring:
    """Finds out whose a key is.

    How long that takes says nothing about the keys: hashes are looked up under the keyed hash of a
    secret of this process, which no caller can aim at, and are then compared in constant time.
    """

    def __init__(self, keys: Sequence[Key]) -> None:
        self._secret = token_bytes(32)
        self._nobody = (token_bytes(32), "")
        self._by_tag = {
            self._tag(digest): (digest, key.name)
            for key in keys
            for digest in [bytes.fromhex(key.sha256)]
        }

    def name(self, presented: bytes) -> str | None:
        """The name of a key; none if it is not known."""
        if not _FEWEST_BYTES <= len(presented) <= _MOST_BYTES:
            return None
        digest = sha256(presented).digest()
        known, name = self._by_tag.get(self._tag(digest), self._nobody)
        return name if compare_digest(known, digest) else None

    def _tag(self, digest: bytes) -> bytes:
        return blake2b(digest, key=self._secret, digest_size=16).digest()


def read_keys(path: Path, named: str = "") -> tuple[Key, ...]:
    """The keys of a file (TOML, a table `[[key]]` for each).

    Args:
        path: of the file.
        named: where the path comes from, for the message.

    Raises:
        KeyFileError: the file is missing, cannot be read, or is no key file.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            raise KeyFileError(f"{named}{path}: not a file")
        return _parse(read_text(path))
    except OSError as fault:
        raise KeyFileError(f"{named}{path}: {fault.strerror}") from fault
    except (ValueError, RecursionError) as fault:
        raise KeyFileError(f"{named}{path}: {fault}") from None


def _parse(text: str) -> tuple[Key, ...]:
    try:
        return _KeyFile.model_validate(tomllib.loads(text)).key
    except ValidationError as faults:
        # Not its cause, which shows the value: it may be a key where its hash belongs.
        fields = (*_KeyFile.model_fields, *Key.model_fields)
        raise ValueError(first_fault(faults, fields)) from None


def add_key(
    path: Path, name: str, images_per_s: float | None = None, burst: int | None = None
) -> str:
    """Make a key and append its hash to a file, which is made if it is not there.

    Args:
        path: of the file.
        name: of the key.
        images_per_s: as in `Key`.
        burst: as in `Key`.

    Returns:
        The key, which is stored nowhere.

    Raises:
        pydantic.ValidationError: a name or a limit that no key may have.
        KeyFileError: the file has a key of that name, cannot be written, or is no key file.
    """
    secret = _PREFIX + token_urlsafe(_RANDOM_BYTES)
    hashed = sha256(secret.encode()).hexdigest()
    key = Key(name=name, sha256=hashed, images_per_s=images_per_s, burst=burst)
    table = "".join(
        f"{field} = {dumps(value)}\n" for field, value in key.model_dump(exclude_none=True).items()
    )
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text = parse_text(file.read())
            if any(known.name.lower() == name.lower() for known in _parse(text)):
                raise KeyFileError(f"{path}: there is a key {name!r} already")
            between = "" if not text else "\n" if text.endswith("\n") else "\n\n"
            file.write(f"{between}[[key]]\n{table}".encode())
    except OSError as fault:
        raise KeyFileError(f"{path}: {fault.strerror}") from fault
    except (ValueError, RecursionError) as fault:
        raise KeyFileError(f"{path}: {fault}") from None
    return secret
