"""Answers that their clients have not taken yet, bounded in bytes over all transports."""

from typing import Protocol

LARGE_BYTES = 64 * 1024  # smaller answers are bounded by the number of connections


class Reader(Protocol):
    """A connection whose client has answers to take; hashable."""

    def has_taken_all(self) -> bool:
        """Whether nothing is left to take, as far as that can be told by looking."""

    def cut_unread(self) -> None:
        """End the connection, because its client leaves its answers untaken."""


class UnreadAnswers:
    """Bounds the bytes of large answers that wait for their clients.

    An answer is in memory until its client has taken all of it, and a client may take its time. So
    when more bytes wait than the limit, the connection with the most of them is cut, which never is
    that of a client with small answers; of equals the one that began to wait first. A single answer
    may be larger than the limit.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._bytes = 0
        self._waiting: dict[Reader, int] = {}

    def add(self, reader: Reader, size: int) -> None:
        """Count an answer of so many bytes, which was just given to its connection."""
        self._waiting[reader] = self._waiting.get(reader, 0) + size
        self._bytes += size
        most = max(self._limit, size)
        if self._bytes <= most:
            return
        for other in [other for other in self._waiting if other is not reader]:
            if other.has_taken_all():
                self.forget(other)
        while self._bytes > most:
            largest = max(self._waiting, key=self._waiting.__getitem__)
            self.forget(largest)
            largest.cut_unread()

    def remove(self, reader: Reader, size: int) -> None:
        """Count an answer no more that was counted, and taken or given up."""
        left = self._waiting.get(reader, 0) - size
        if left > 0:
            self._waiting[reader] = left
            self._bytes -= size
        else:
            self.forget(reader)

    def forget(self, reader: Reader) -> None:
        """Count no answers of a connection any more."""
        self._bytes -= self._waiting.pop(reader, 0)
