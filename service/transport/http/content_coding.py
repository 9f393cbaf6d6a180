"""Compressed bodies (RFC 9110, section 8.4.1), a piece at a time."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterable

from service.errors import ImageTooLarge, InvalidRequest, UnsupportedCoding, quoted

READ = ("gzip", "deflate")
_PIECE_BYTES = 2**20
# A compressor of blocks ends a member every 64 kB. Empty ones cost time for no bytes.
_MOST_MEMBERS = 4096


def choose(headers: Iterable[str]) -> str:
    """The coding of a body from its `Content-Encoding` headers; empty where there is none.

    Raises:
        UnsupportedCoding: one that is not read here, or several.
    """
    given = [coding.strip().lower() for header in headers for coding in header.split(",")]
    codings = [coding for coding in given if coding not in ("", "identity")]
    coding = "".join(codings[:1]).removeprefix("x-")
    if len(codings) > 1 or (coding and coding not in READ):
        raise UnsupportedCoding(
            f"this server does not read the content coding {quoted(', '.join(codings))}; send "
            f"{', '.join(READ)} or none"
        )
    return coding


async def decompressed(
    chunks: AsyncIterator[bytes], coding: str, limit: int
) -> AsyncIterator[bytes]:
    """The content of a body from what was sent.

    Args:
        chunks: as they come.
        coding: one of those that are read here.
        limit: most bytes that may be sent; the caller bounds the content itself.

    Raises:
        ImageTooLarge: more than `limit` bytes were sent.
        InvalidRequest: what was sent is not of that coding, is cut, or goes on behind its end.
    """
    inflater, received = _Inflater(coding), 0
    async for chunk in chunks:
        received += len(chunk)
        if received > limit:
            raise ImageTooLarge("too_large", f"the body has more than {limit} bytes")
        inflater.feed(chunk)
        # Off the event loop: a small chunk can hold much.
        while piece := await asyncio.to_thread(inflater.read):
            yield piece
    inflater.finish()


class _Inflater:
    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._sent = b""
        self._more = False  # the newest piece was full, so that there may be more of it
        self._stream: zlib._Decompress | None = None
        self._members = 0

    def feed(self, chunk: bytes) -> None:
        self._sent += chunk

    def read(self) -> bytes:
        """The next piece of the content; empty when more must be sent for it."""
        while self._sent or self._more:
            if self._stream is None:
                if self._coding == "deflate" and len(self._sent) < 2:
                    break
                self._stream = self._begin()
            try:
                piece = self._stream.decompress(self._sent, _PIECE_BYTES)
            except zlib.error as error:
                raise InvalidRequest(f"the body is not {self._coding}: {error}") from error
            self._more = len(piece) == _PIECE_BYTES
            self._sent = self._stream.unconsumed_tail
            if self._stream.eof:
                self._sent, self._stream, self._more = self._stream.unused_data, None, False
            if piece:
                return piece
        return b""

    def finish(self) -> None:
        """Check that the content has come to its end.

        Raises:
            InvalidRequest: it has not, or something follows it.
        """
        if self._stream is not None or self._sent or not self._members:
            raise InvalidRequest(f"the {self._coding} data of the body is cut, or followed by more")

    def _begin(self) -> "zlib._Decompress":
        self._members += 1
        if self._members > (1 if self._coding == "deflate" else _MOST_MEMBERS):
            raise InvalidRequest(f"the {self._coding} data of the body is followed by more")
        if self._coding == "gzip":
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        # `deflate` is the name of the zlib format, but some clients send the raw data inside it.
        first, second = self._sent[:2]
        is_zlib = first & 15 == 8 and (first * 256 + second) % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
