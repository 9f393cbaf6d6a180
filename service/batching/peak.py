"""The most there was of something in the newest seconds."""

from collections import deque


class Peak:
    """Remembers the largest of recent values, each until a larger one comes."""

    def __init__(self) -> None:
        self._falling: deque[tuple[float, int]] = deque()  # each value smaller than the one before

    def note(self, value: int, now: float) -> None:
        """Note what there is now.

        Args:
            value: not negative.
            now: any clock, seconds; never runs back.
        """
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now, value))

    def most(self, since: float) -> int:
        """The largest value since then, of which the newest is always one; 0 where none was noted.

        Args:
            since: as `now`. What was before is forgotten.
        """
        while len(self._falling) > 1 and self._falling[0][0] < since:
            self._falling.popleft()
        return self._falling[0][1] if self._falling else 0
