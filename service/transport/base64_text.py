"""Base64 as clients write it: either alphabet, with or without padding, line breaks, a data URL."""

import binascii
import io
import re

_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")
_LINE_BREAKS = b"\r\n\t"
_DATA_URL = re.compile(r"data:([^,]{0,255}),", re.IGNORECASE)
_STRANGE = "it has a character that base64 does not have"


class Base64Decoder:
    """Decodes a text that comes in pieces, so that no call takes long.

    RFC 4648, sections 4 and 5. A `data:` URL must say that it is base64. A space is an error: it
    is what a form makes of a plus.

    Args:
        length: of the text, at most; what it says is in memory once.
    """

    def __init__(self, length: int) -> None:
        self._decoded = io.BytesIO()
        self._decoded.seek(length * 3 // 4)
        self._decoded.write(b"\0")  # takes all the memory at once, and never moves it
        self._decoded.seek(0)
        self._rest = b""  # characters that are no group of four yet
        self._padding = 0
        self._begun = False

    def feed(self, text: str) -> None:
        """Decode the next piece; the first holds the whole head of a data URL.

        Raises:
            ValueError: it is not base64; the message says why.
        """
        if not self._begun:
            self._begun = True
            if url := _DATA_URL.match(text):
                if not url[1].lower().endswith(";base64"):
                    raise ValueError("its data URL is not base64")
                text = text[url.end() :]
        characters = _ascii(text).translate(_STANDARD_ALPHABET, _LINE_BREAKS)
        unpadded = characters.rstrip(b"=")
        if b"=" in unpadded or (unpadded and self._padding):
            raise ValueError("characters follow its padding")
        self._padding += len(characters) - len(unpadded)
        unpadded = self._rest + unpadded
        whole = len(unpadded) // 4 * 4
        self._decoded.write(_decode(unpadded[:whole]))
        self._rest = unpadded[whole:]

    def finish(self) -> bytes:
        """What was decoded.

        Raises:
            ValueError: the text ends too early, or with the wrong padding.
        """
        missing = -len(self._rest) % 4
        if missing == 3 or self._padding not in (0, missing):
            raise ValueError("it ends too early or with the wrong padding")
        self._decoded.write(_decode(self._rest + b"=" * missing))
        self._decoded.truncate()
        return self._decoded.getvalue()


def _ascii(text: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError as error:
        raise ValueError(_STRANGE) from error


def _decode(groups: bytes) -> bytes:
    try:
        return binascii.a2b_base64(groups, strict_mode=True)
    except binascii.Error as error:
        raise ValueError(_STRANGE) from error
