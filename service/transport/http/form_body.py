"""Multipart bodies (RFC 7578) to images and options, at a cost that their size bounds."""

import re
from collections.abc import Iterator
from itertools import islice

from service.errors import InvalidOption, InvalidRequest, TooManyImages, quoted
from service.transport.http.json_body import MAX_OPTIONS, MAX_OPTIONS_BYTES

_LONGEST_BOUNDARY = 70  # RFC 2046, section 5.1.1
_LONGEST_HEAD = 8 * 1024  # of a part, bytes
_MOST_FIELDS = 16  # of the head of a part, and parameters of a field
_AS_THEY_ARE = (b"7bit", b"8bit", b"binary")
_WINDOW_BYTES = 2**21  # of one search, which holds the lock of the interpreter
_AFTER_BOUNDARY = re.compile(rb"(--)|[ \t]*+\r\n")
_PARAMETER = re.compile(rb';[ \t]*+([^\s=;"]++)[ \t]*+=[ \t]*+(?:"((?:[^"\\]|\\.)*+)"|([^\s;"]*+))')
_IMAGE_FIELDS = {"file", "files", "image", "images"}


def boundary_of(content_type: str) -> bytes:
    """What separates the parts of a body of this content type.

    Raises:
        InvalidRequest: it names no boundary, or one that RFC 2046 does not allow.
    """
    boundary = _parameters(content_type.encode("latin-1")).get(b"boundary", b"")
    if not 0 < len(boundary) <= _LONGEST_BOUNDARY:
        raise InvalidRequest(
            "the content type of the multipart body names no boundary of 1 to "
            f"{_LONGEST_BOUNDARY} characters"
        )
    return boundary


def read_form(
    body: bytes | bytearray, boundary: bytes, max_images: int
) -> tuple[list[bytes], dict[str, str]]:
    """The images and the options of a form.

    A part is an image if it has a file name, if its type or its name says so; else an option.

    Raises:
        InvalidRequest: the body is not such a form; without its closing boundary it was cut.
        InvalidOption: an option is given twice, or the options are too many or too long.
        TooManyImages: more than `max_images`; no more than those were copied.
    """
    images: list[bytes] = []
    options: dict[str, str] = {}
    options_bytes = 0
    for start, end in _parts(body, boundary):
        name, is_image, content = _read_head(body, start, end)
        if is_image:
            if len(images) == max_images:
                raise TooManyImages(f"the request holds more than {max_images} images")
            images.append(bytes(memoryview(body)[content:end]))
            continue
        if name in options:
            raise InvalidOption(f"{quoted(name)} is given twice in the form")
        options_bytes += end - content
        if len(options) == MAX_OPTIONS or options_bytes > MAX_OPTIONS_BYTES:
            raise InvalidOption(
                f"the form has more than {MAX_OPTIONS} options or {MAX_OPTIONS_BYTES} bytes of them"
            )
        options[name] = body[content:end].decode(errors="replace")
    return images, options


def _parts(body: bytes | bytearray, boundary: bytes) -> Iterator[tuple[int, int]]:
    """Where each part starts and ends."""
    delimiter = b"\r\n--" + boundary
    opening = delimiter[2:]
    at = 0 if body.startswith(opening) else _find(body, delimiter, 0) + 2
    at += len(opening)
    while True:
        line_end = _AFTER_BOUNDARY.match(body, at, at + _LONGEST_HEAD)
        if line_end is None:
            raise InvalidRequest("a boundary of the multipart body is not followed by a line end")
        if line_end[1]:
            return
        end = _find(body, delimiter, line_end.end())
        yield line_end.end(), end
        at = end + len(delimiter)


def _find(body: bytes | bytearray, delimiter: bytes, start: int) -> int:
    while start < len(body):
        found = body.find(delimiter, start, start + _WINDOW_BYTES)
        if found >= 0:
            return found
        start += _WINDOW_BYTES - len(delimiter)
    raise InvalidRequest("the multipart body ends without its closing boundary; it was cut")


def _read_head(body: bytes | bytearray, start: int, end: int) -> tuple[str, bool, int]:
    """The name of a part, whether it is an image, and where its content starts."""
    blank = body.find(b"\r\n\r\n", start, min(end, start + _LONGEST_HEAD))
    lines = body[start:blank].split(b"\r\n", _MOST_FIELDS)
    if blank < 0 or len(lines) > _MOST_FIELDS:
        raise InvalidRequest(
            f"the head of a part has no end, more than {_LONGEST_HEAD} bytes or more than "
            f"{_MOST_FIELDS} lines"
        )
    fields: dict[bytes, bytes] = {}
    for line in lines:
        field, _, value = line.partition(b":")
        fields[bytes(field.strip().lower())] = bytes(value.strip())
    disposition = fields.get(b"content-disposition", b"")
    parameters = _parameters(disposition)
    if not disposition.lower().startswith(b"form-data") or b"name" not in parameters:
        raise InvalidRequest("a part is not `Content-Disposition: form-data` with a name")
    name = parameters[b"name"].decode(errors="replace")
    coding = fields.get(b"content-transfer-encoding", b"binary").lower()
    if coding not in _AS_THEY_ARE:
        raise InvalidRequest(
            f"the transfer encoding {quoted(coding.decode('latin-1'))} of the part {quoted(name)} "
            "is not read by this server; send its bytes as they are"
        )
    kind = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind.startswith(b"multipart/"):
        raise InvalidRequest(
            f"the part {quoted(name)} is itself multipart; send one part for each file"
        )
    is_image = (
        # `filename*` of RFC 8187, or its pieces in RFC 2231.
        any(parameter.partition(b"*")[0] == b"filename" for parameter in parameters)
        or name in _IMAGE_FIELDS
        or kind.startswith(b"image/")
        or kind == b"application/octet-stream"
    )
    return name, is_image, blank + 4


def _parameters(value: bytes) -> dict[bytes, bytes]:
    """The parameters of a field such as `form-data; name="file"`, the first few."""
    found = islice(_PARAMETER.finditer(value), _MOST_FIELDS)
    return {match[1].lower(): match[2] if match[3] is None else match[3] for match in found}
