"""Who asks, and whether they may: the one rule for requests of both transports."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog
from prometheus_client import Counter

from service.errors import RateLimited, ServiceError, Unauthenticated
from service.logs import Summed
from service.metrics.replica import Metrics
from service.security.keys import Key, Keyring
from service.security.rate import TokenBucket

CREDENTIALS = ("authorization", "x-api-key")  # the headers, and the metadata, that show a key
NOBODY = "_none"  # in the metrics, whoever shows no key that is known
_SCHEME = b"bearer"
_REALM = 'Bearer realm="dat-serve"'
_MISSING = Unauthenticated(
    "this server needs an API key, as the header Authorization: Bearer KEY or X-API-Key: KEY",
    challenge=_REALM,
)
_WRONG = Unauthenticated(
    "this server does not know the API key", challenge=f'{_REALM}, error="invalid_token"'
)
_SEVERAL = Unauthenticated(
    "the request shows several API keys", challenge=f'{_REALM}, error="invalid_request"'
)

log = structlog.get_logger(__name__)


class Caller:
    """Who asks.

    Attributes:
        name: of the key.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name = name
        self._bucket: TokenBucket | None = None
        self._limit = ""
        self._images: Counter = metrics.key_images.labels(name)
        self._refused: Counter = metrics.key_refused.labels(name, RateLimited.code)

    def limit(self, key: Key, share: float) -> None:
        """Take the limits of the key, of which the caller has a share here."""
        rate = key.images_per_s
        if rate is None:
            self._bucket = None
            return
        burst = max(1.0, rate) if key.burst is None else float(key.burst)
        self._limit = f"{rate:g} images a second, {burst:g} at once"
        if self._bucket is None:
            self._bucket = TokenBucket(rate * share, burst * share)
        else:
            self._bucket.change(rate * share, burst * share)

    def refusal(self) -> RateLimited | None:
        """Why the caller may not ask for a single image now, if so; it is counted then."""
        wait_s = 0.0 if self._bucket is None else self._bucket.wait_s()
        return self._refuse(wait_s) if wait_s else None

    @contextmanager
    def spend(self, images: int) -> Iterator[None]:
        """Answer so many images; they count unless this server has no room for them.

        Raises:
            RateLimited: the caller may not ask for so many now.
        """
        wait_s = 0.0 if self._bucket is None else self._bucket.take(images)
        if wait_s:
            raise self._refuse(wait_s)
        answered = images
        try:
            yield
        except ServiceError as error:
            if error.outcome == "rejected":
                answered = 0
                if self._bucket is not None:
                    self._bucket.give_back(images)
            raise
        finally:
            self._images.inc(answered)

    def _refuse(self, wait_s: float) -> RateLimited:
        self._refused.inc()
        return RateLimited(f"the key {self.name!r} may ask for {self._limit}", wait_s)


class Access:
    """Tells by the head of a request whose it is.

    Without `keys` everybody may ask.

    Args:
        metrics: count by the names of keys.
        share: of the limits of a key that this process has: 1/N if N of them answer together.
    """

    def __init__(self, metrics: Metrics, share: float = 1.0) -> None:
        self._metrics = metrics
        self._share = share
        self._keyring: Keyring | None = None
        self._callers: dict[str, Caller] = {}
        self._nobody = Caller(NOBODY, metrics)
        self._unknown: Counter = metrics.key_refused.labels(NOBODY, Unauthenticated.code)
        self._turned_away = Summed(log.info, "requests without a known key")

    def take(self, keys: Sequence[Key]) -> None:
        """Let the owners of these keys ask, and nobody else.

        Callers that stay keep what is left of their limits.
        """
        if not keys:
            log.warning("the key file holds no key, so every request is refused")
        callers = {
            key.name: self._callers.get(key.name) or Caller(key.name, self._metrics) for key in keys
        }
        for key in keys:
            callers[key.name].limit(key, self._share)
        self._callers, self._keyring = callers, Keyring(keys)

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller | ServiceError:
        """Who asks, or why nobody is answered; that is counted.

        Args:
            headers: of a request, or its metadata; their names in lower case.
        """
        caller = self.identify(headers)
        return caller if isinstance(caller, ServiceError) else caller.refusal() or caller

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller | Unauthenticated:
        """Who asks, whatever was asked for already; the argument is that of `admit`."""
        if self._keyring is None:
            return self._nobody
        shown = _shown(headers)
        if isinstance(shown, bytes):
            name = self._keyring.name(shown)
            if name is not None:
                return self._callers[name]
            shown = _WRONG
        self._unknown.inc()
        self._turned_away.add()
        return shown


def _shown(headers: Iterable[tuple[bytes, bytes]]) -> bytes | Unauthenticated:
    """The key that a request shows.

    `X-API-Key` comes first: `Authorization` may be meant for a proxy before this server.
    """
    keys, tokens = [], []
    for name, value in headers:
        if name == b"x-api-key":
            keys.append(value.strip())
        elif name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            if scheme.lower() == _SCHEME:
                tokens.append(token.strip())
    shown = keys or tokens
    if len(shown) > 1:
        return _SEVERAL
    return shown[0] if shown else _MISSING
