"""How long an image that came now would take, and how long its caller will wait for it.

Learned from the batches and the callers before. Knows nothing of queues, devices or transports.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from time import monotonic
from typing import NamedTuple

_SMOOTHING = 0.1  # share of the newest measurement: the last batches of a crowd are the fastest
_SMOOTHING_OF_ANSWERS = 0.01  # of which a crowd gives hundreds
_MOST_CORRECTED = 2.0  # times more or less; what is further off was something else
_CALLERS = 32  # whose end is remembered, for a while
_RECENT_S = 1.0
_TELLING = 7  # of them must have left early, before they tell what the next ones will do
# A program that ends takes its requests along, so that callers who leave once are forgotten soon;
# a crowd that does not wait leaves again.
_DOUBTED_S = 0.5
_RELAXED_IN_DOUBT_PER_S = 200.0
_AGAIN_AFTER_S, _AGAIN_WITHIN_S = 0.2, 1.0
_FORGOTTEN_S = 20.0
_RELAXED_PER_S = 1.3  # by which the patience grows while nobody leaves
_LAGS = 5  # requests of which it is remembered how late they were read
_LAG_REMEMBERED_S = 0.2
_BATCHES_WAITED_FOR = 2.0  # while others are in doubt: the one on the device, and one's own


class Expected(NamedTuple):
    """When an answer is expected.

    Attributes:
        seconds: from now; 0 where nothing was measured yet.
        of_crowd: the same before `Forecast` corrects it; 0 where no crowd is ahead.
    """

    seconds: float = 0.0
    of_crowd: float = 0.0


UNKNOWN = Expected()


@dataclass
class Batches:
    """What the batches of one model have shown.

    Attributes:
        compute_s: time on the device, seconds, by size.
        usual: items in a batch.
        stretch: between the ends of two batches, of the time that one takes.
        began_at: when the device turned to the newest, by the clock of the forecast.
    """

    compute_s: dict[int, float] = field(default_factory=dict)
    usual: float = 0.0
    stretch: float = 0.0
    began_at: float = inf


class End(NamedTuple):
    """How a caller went.

    Attributes:
        at: when, by the clock of the forecast.
        age_s: seconds after it came.
        left: whether that was before it had its answer.
    """

    at: float
    age_s: float
    left: bool


class Forecast:
    """What the batches and the callers of one model have shown.

    Args:
        clock: seconds; any start.

    Attributes:
        batches: what these have shown.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self.batches = Batches()
        self._ends: deque[End] = deque(maxlen=_CALLERS)
        self._lags: deque[float] = deque(maxlen=_LAGS)
        self._lag_at = -inf
        self._patience_s = inf
        self._evidence_at = self._left_at = -inf
        self._suspected_at = -inf  # when they began to leave
        self._forgotten_s = _DOUBTED_S
        self._correction = 1.0  # what answers in a crowd took of what batches alone foretell

    def batch_began(self) -> None:
        """Note that a device turned to a batch."""
        self.batches.began_at = self._clock()

    def batch_ended(self, size: int, compute_s: float, spacing_s: float, *, crowded: bool) -> None:
        """Learn from a batch.

        Args:
            size: its items.
            compute_s: how long it had the device, seconds.
            spacing_s: since the end of the batch before it, while there was work.
            crowded: whether a whole batch waited all that time.
        """
        seen = self.batches
        seen.compute_s[size] = _smoothed(seen.compute_s.get(size, 0.0), compute_s)
        seen.usual = _smoothed(seen.usual, size)
        # Of several devices one alone may have been at work, which says nothing of all of them.
        if crowded or seen.stretch >= 1.0 or not seen.stretch:
            seen.stretch = _smoothed(seen.stretch, spacing_s / max(compute_s, 1e-9))

    def answered(self, expected: Expected, took_s: float) -> None:
        """Learn from an answer that was expected.

        What it costs to receive, decode and answer a crowd, on cores that the device may need as
        well, shows in whole answers and not in single batches.
        """
        if expected.of_crowd:
            newest = took_s / expected.of_crowd
            newest = min(max(newest, 1 / _MOST_CORRECTED), _MOST_CORRECTED)
            self._correction += _SMOOTHING_OF_ANSWERS * (newest - self._correction)

    def expect(self, waiting: int, running: int, decode_s: float = 0.0) -> Expected:
        """When all that wait will have their answers.

        Args:
            waiting: items, those ahead and those that come now.
            running: items on the devices.
            decode_s: until those that come now are decoded, seconds.
        """
        if not self.batches.compute_s:
            return UNKNOWN
        largest = max(self.batches.compute_s)
        ahead_s = self._on_device_s(running, largest)
        if not waiting:
            return Expected(self.batches.stretch * ahead_s)
        before, last = divmod(waiting - 1, largest)
        # Others will join the last batch as they join any.
        own_s = self.compute_s(max(last + 1, min(largest, round(self.batches.usual))))
        ahead_s += before * self.compute_s(largest)
        stretch = self.batches.stretch
        seconds = max(stretch * ahead_s, decode_s) + max(stretch, 1.0) * own_s
        return Expected(self._correction * seconds, seconds) if before else Expected(seconds)

    def _on_device_s(self, running: int, largest: int) -> float:
        if not running:
            return 0.0
        batches, rest = divmod(running, largest)
        all_s = batches * self.compute_s(largest) + (self.compute_s(rest) if rest else 0.0)
        # One of them is on its way already, by how much is known of the newest.
        newest_s = self.compute_s(min(running, largest))
        return all_s - min(max(0.0, self._clock() - self.batches.began_at), newest_s)

    def compute_s(self, size: int) -> float:
        """Time on the device of a batch of that size; 0 where nothing was measured yet.

        Between two sizes that were measured it grows evenly, beyond all of them with the size.
        """
        if size in self.batches.compute_s or not self.batches.compute_s:
            return self.batches.compute_s.get(size, 0.0)
        smaller = max((known for known in self.batches.compute_s if known < size), default=None)
        larger = min((known for known in self.batches.compute_s if known > size), default=None)
        if smaller is None or larger is None:
            nearest = smaller or larger or size
            return self.batches.compute_s[nearest] * max(1.0, size / nearest)
        low_s, high_s = self.batches.compute_s[smaller], self.batches.compute_s[larger]
        return low_s + (high_s - low_s) * (size - smaller) / (larger - smaller)

    def request_read(self, after_s: float) -> None:
        """Note that a request was read so long after it had come, seconds."""
        self._lags.append(after_s)
        self._lag_at = self._clock()

    @property
    def lag_s(self) -> float:
        """How late requests are read, seconds.

        The median of the last ones, so that a few clients cannot pretend it.
        """
        if self._clock() - self._lag_at > _LAG_REMEMBERED_S:
            return 0.0
        return sorted(self._lags)[len(self._lags) // 2]

    def caller_left(self, age_s: float) -> None:
        """Learn from a caller that left before its answer, `age_s` seconds after it came."""
        if age_s < self.compute_s(1):
            return  # no server could have answered, so that it does not matter how many do that
        self._left_at = self._clock()
        self._ends.append(End(self._left_at, age_s, left=True))
        early_s = self._half_left_after_s()
        if early_s == inf:
            return
        now = self._clock()
        is_crowd = self.patience_s < inf and self._forgotten_s == _FORGOTTEN_S
        since = now - self._suspected_at
        if since > max(_AGAIN_WITHIN_S, 2 * early_s):
            self._suspected_at = now
        elif since >= _AGAIN_AFTER_S:
            is_crowd = True
        self._patience_s = min(self.patience_s, early_s)
        self._forgotten_s = _FORGOTTEN_S if is_crowd else _DOUBTED_S
        self._evidence_at = now

    def caller_answered(self, age_s: float) -> None:
        """Learn from a caller that waited for its answer, `age_s` seconds long."""
        self._ends.append(End(self._clock(), age_s, left=False))
        # One who waits longer shows that those who leave are gone, unless others have just left.
        if age_s > self.patience_s and self._clock() - self._left_at > _RECENT_S:
            self._evidence_at = -inf

    def _half_left_after_s(self) -> float:
        """The age at which half of all callers leave that have no answer yet; infinite if none.

        Those who ended otherwise do not tell how long they would have waited, and the share of
        those who stay is estimated from the others (Kaplan and Meier, 1958). So a minority that
        leaves at once does not speak for those who wait.
        """
        now, stay, left = self._clock(), 1.0, 0
        recent = [end for end in self._ends if now - end.at <= max(_RECENT_S, 2 * end.age_s)]
        for after, end in enumerate(sorted(recent, key=attrgetter("age_s"))):
            if end.left:
                stay *= 1 - 1 / (len(recent) - after)
                left += 1
                if stay <= 0.5 and left >= _TELLING:
                    return end.age_s
        return inf

    @property
    def patience_s(self) -> float:
        """After what time callers that name no deadline are likely to have left.

        Infinite unless callers do leave. It grows again while they do not, for those that are
        turned away in time cannot show that they would have waited. And while they are in doubt it
        is long enough for a place in a whole batch, whatever others do.
        """
        since = self._clock() - self._evidence_at
        if since > self._forgotten_s:
            return inf
        if self._forgotten_s == _FORGOTTEN_S:
            return self._patience_s * float(_RELAXED_PER_S**since)
        batch_s = max((self.compute_s(size) for size in self.batches.compute_s), default=0.0)
        least_s = _BATCHES_WAITED_FOR * max(1.0, self.batches.stretch) * batch_s
        return max(least_s, self._patience_s * float(_RELAXED_IN_DOUBT_PER_S**since))


def _smoothed(before: float, newest: float) -> float:
    return before + _SMOOTHING * (newest - before) if before else newest
