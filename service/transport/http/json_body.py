"""JSON bodies to images and options, at a cost that their size bounds.

A parser that builds all that it reads can be made to take many times the size of a body in
memory. This one builds nothing but the images, piece by piece from where they stand, and leaves
the options, which are short, to the real parser.
"""

import codecs
import json
import re
from typing import NoReturn

from service.errors import InvalidImage, InvalidOption, InvalidRequest, TooManyImages, quoted
from service.tasks.core import Upload
from service.transport.base64_text import Base64Decoder

MAX_OPTIONS = 64
MAX_OPTIONS_BYTES = 64 * 1024  # the names of some thousand classes
_MAX_DEPTH = 4

# Of one call of a regular expression, which holds the lock of the interpreter.
_WINDOW_BYTES = 2**20
_BLANK = re.compile(rb"[ \t\n\r]*+")
_PLAIN = rb'[^"\\\x00-\x1f]*+'
_CHARACTERS = rb"%b(?:\\(?:[^u\x00-\x1f]|u[0-9a-fA-F]{4})%b)*+" % (_PLAIN, _PLAIN)
_PART_OF_STRING = re.compile(_CHARACTERS)
_STRING = re.compile(rb'"%b"' % _CHARACTERS)


def _value(depth: int) -> bytes:
    """A pattern of a string, a word, or what matching brackets hold."""
    word = rb'"%b"|[^\x00-\x20"\[\]{},:]++' % _CHARACTERS
    if not depth:
        return word
    inside = rb"(?:%b|[\x00-\x20,:])*+" % _value(depth - 1)
    return rb"(?:%b|\[%b\]|\{%b\})" % (word, inside, inside)


_VALUE = re.compile(_value(_MAX_DEPTH))


def read_json(body: bytes | bytearray, max_images: int) -> tuple[list[Upload], bytes]:
    """The images of a body, and a JSON object of everything else.

    An image that is not base64 is the failure of that image alone.

    Args:
        body: one JSON object, UTF-8, perhaps with a byte order mark.
        max_images: of a request.

    Raises:
        InvalidRequest: it is not such an object, or its images are not strings.
        InvalidOption: an option is given twice, or the options are too many or too long.
        TooManyImages: more than `max_images`; no more than those were built.
    """
    return _Reader(body).read(max_images)


class _Reader:
    def __init__(self, body: bytes | bytearray) -> None:
        self._body = body
        self._at = 0
        self._given = False
        self._images: list[Upload] = []
        self._options: list[bytes] = []
        self._options_bytes = 0

    def read(self, max_images: int) -> tuple[list[Upload], bytes]:
        if self._body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InvalidRequest("the body is UTF-16 or UTF-32; send JSON as UTF-8")
        self._at = len(codecs.BOM_UTF8) * self._body.startswith(codecs.BOM_UTF8)
        if not self._take(b"{"):
            raise InvalidRequest("the body is not a JSON object")
        names: set[str] = set()
        if not self._take(b"}"):
            self._member(names, max_images)
            while not self._take(b"}"):
                self._expect(b",")
                self._member(names, max_images)
        if self._next():
            raise InvalidRequest(f"something follows the JSON of the body, at byte {self._at}")
        return self._images, b"{%b}" % b",".join(self._options)

    def _member(self, names: set[str], max_images: int) -> None:
        name, written = self._name()
        if name in names:
            error = InvalidRequest if name in ("image", "images") else InvalidOption
            raise error(f"{quoted(name)} is given twice in the body")
        names.add(name)
        self._expect(b":")
        if name not in ("image", "images"):
            self._option(written)
        elif not self._take(b"null"):
            if self._given:
                raise InvalidRequest("the body has both image and images; give one of them")
            self._given = True
            if name == "image":
                self._images.append(self._image(name))
            else:
                self._image_list(name, max_images)

    def _image_list(self, name: str, max_images: int) -> None:
        if not self._take(b"["):
            raise InvalidRequest(f"{name} is not a list")
        if self._take(b"]"):
            return
        self._images.append(self._image(name))
        while not self._take(b"]"):
            self._expect(b",")
            if len(self._images) == max_images:
                raise TooManyImages(f"the request holds more than {max_images} images")
            self._images.append(self._image(name))

    def _image(self, name: str) -> Upload:
        if not self._take(b'"'):
            raise InvalidRequest(f"{name}: an image is a string of base64")
        start = self._at
        while not self._take_part():
            pass
        end, self._at = self._at, start
        try:
            return self._decode(end)
        except ValueError as error:
            return InvalidImage("bad_base64", f"the image is not base64: {error}")
        finally:
            self._at = end + 1

    def _decode(self, end: int) -> bytes:
        """The image of a string, up to its end."""
        utf8 = codecs.getincrementaldecoder("utf-8")()
        decoder = Base64Decoder(end - self._at)
        while self._at < end:
            start = self._at
            ended = self._take_part()
            try:
                text = utf8.decode(self._body[start : self._at], ended)
                if "\\" in text:
                    text = json.loads(f'"{text}"')
            except ValueError:  # also what a faulty encoding raises
                self._malformed("a string is not UTF-8, or has a faulty escape")
            decoder.feed(text)
        return decoder.finish()

    def _take_part(self) -> bool:
        """Go on within a string, and say whether its end stands next."""
        start = self._at
        part = _PART_OF_STRING.match(self._body, start, start + _WINDOW_BYTES)
        assert part, "the pattern matches an empty part too: this is a bug"
        self._at = part.end()
        ended = self._body.startswith(b'"', self._at)
        if self._at == start and not ended:
            self._malformed("a string has no end, or a control character")
        return ended

    def _option(self, written: bytes) -> None:
        self._options.append(b"%b:%b" % (written, self._short(_VALUE)))
        if len(self._options) > MAX_OPTIONS:
            raise InvalidOption(f"the body has more than {MAX_OPTIONS} options")

    def _name(self) -> tuple[str, bytes]:
        written = self._short(_STRING)
        try:
            return json.loads(written), written
        except ValueError:
            self._malformed("a name is not UTF-8, or has a faulty escape")

    def _short(self, pattern: re.Pattern[bytes]) -> bytes:
        """What stands next: a name, or the value of an option."""
        first = self._next()
        left = MAX_OPTIONS_BYTES - self._options_bytes
        found = pattern.match(self._body, self._at, self._at + left + 1)
        if found is None and (first not in b'"[{' or len(self._body) - self._at <= left):
            self._malformed(f"a value is missing, has no end, or is nested over {_MAX_DEPTH} deep")
        size = left + 1 if found is None else found.end() - self._at
        if size > left:
            raise InvalidOption(f"the options of the body have more than {MAX_OPTIONS_BYTES} bytes")
        self._options_bytes += size
        self._at += size
        return bytes(self._body[self._at - size : self._at])

    def _next(self) -> bytes:
        """The byte that stands next; empty at the end."""
        while True:
            start = self._at
            blank = _BLANK.match(self._body, start, start + _WINDOW_BYTES)
            assert blank, "the pattern matches nothing too: this is a bug"
            self._at = blank.end()
            if self._at < start + _WINDOW_BYTES:
                return bytes(self._body[self._at : self._at + 1])

    def _take(self, token: bytes) -> bool:
        """Go past a token if it stands next."""
        self._next()
        taken = self._body.startswith(token, self._at)
        self._at += len(token) * taken
        return taken

    def _expect(self, token: bytes) -> None:
        if not self._take(token):
            self._malformed(f"{token.decode()} is missing")

    def _malformed(self, reason: str) -> NoReturn:
        raise InvalidRequest(f"the body is not JSON: {reason}, at byte {self._at}")
