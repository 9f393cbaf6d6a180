"""How much a key may ask for: a token bucket."""

from collections.abc import Callable
from time import monotonic

_ROUNDING = 1e-9


class TokenBucket:
    """Fills at a rate up to a burst; what is asked for is taken out of it.

    In any `t` seconds at most `burst + rate * t` tokens are taken. Who asks for more than the
    burst at once is given that from a full bucket, and whoever comes later waits until the bucket
    has made up for it.

    Args:
        rate: tokens a second.
        burst: most tokens that it holds.
        clock: seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = burst
        self._filled_at = clock()

    def wait_s(self, tokens: float = 1.0) -> float:
        """Time after which so many tokens can be taken, seconds; 0 if they can be now."""
        self._fill()
        missing = min(tokens, self._burst) - self._level
        return missing / self._rate if missing > _ROUNDING else 0.0

    def take(self, tokens: float) -> float:
        """Take tokens, all or none; if none, the time of `wait_s`, else 0."""
        wait_s = self.wait_s(tokens)
        if not wait_s:
            self._level -= tokens
        return wait_s

    def give_back(self, tokens: float) -> None:
        """Give back tokens that were taken for nothing."""
        self._fill()
        self._level = min(self._burst, self._level + tokens)

    def change(self, rate: float, burst: float) -> None:
        """Go on with another rate and burst, and with no more than what is there now."""
        self._fill()
        self._rate, self._burst = rate, burst
        self._level = min(self._level, burst)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now
