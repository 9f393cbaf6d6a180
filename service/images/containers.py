"""Untrusted JPEG, PNG and WebP bytes: their size and orientation, read without decoding.

Only what the pixels depend on is passed on to the decoder. Metadata is where a few hundred
bytes unpack to megabytes (text and profiles in PNG) and where Pillow warns and spends most of
its Python time (EXIF, multi-picture files, very many small segments).

What follows the end of an image is not the image: the video of a motion photo, a second picture,
padding. It is neither checked nor passed on.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from service.errors import InvalidImage

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_PREFIX = b"Exif\0\0"

# Each part costs the decoder a step in Python, under the interpreter lock. A file of 10 MB in
# PNG chunks of 1 kB stays below.
_MAX_PARTS = 10_000
# All tables of a JPEG take less than 4 kB and a JFIF thumbnail 64 kB; Pillow reads the tables in
# Python, 0.15 s for 1 MB.
_MAX_HEADER_BYTES = 2**18
# Each scan of a progressive JPEG is a pass over the whole image, and an empty one takes a few
# dozen bytes: 1000 scans over 4000x4000 pixels, 94 kB in all, decode for 11 s. Encoders write
# 6 to 18.
_MAX_SCANS = 50


@dataclass(frozen=True)
class Container:
    """An image file without its metadata.

    Attributes:
        format: the name that Pillow knows the format by.
        width: of the image as stored, pixels.
        height: of the image as stored, pixels.
        orientation: the EXIF orientation, 1 to 8; 1 where there is none that can be read.
        data: the file, reduced to what its pixels depend on.
    """

    format: Literal["JPEG", "PNG", "WEBP"]
    width: int
    height: int
    orientation: int
    data: bytes


def read_container(data: bytes) -> Container:
    """Take an image file apart.

    Raises:
        InvalidImage: the file is empty, of another format, cut off before its end, or malformed.
    """
    if not data:
        raise InvalidImage("empty", "the image has no bytes")
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data.startswith(_PNG_SIGNATURE):
        return _read_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _read_webp(data)
    raise InvalidImage("unsupported", "the bytes are not a JPEG, PNG or WebP image")


# Segments before the frame of a JPEG. Cameras write about ten, and editors up to a hundred of a
# colour profile or of a thumbnail.
_PARTS_BEFORE_SIZE = 200


def declared_pixels(data: bytes) -> int | None:
    """How many pixels an image says that it has, from its first bytes; takes microseconds.

    Nothing else is checked. The result is 0 where the bytes are not an image that could be decoded,
    and `None` where its size would have to be searched for.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _declared_by_jpeg(data)
    if data.startswith(_PNG_SIGNATURE) and len(data) >= 24:
        width, height = struct.unpack_from(">II", data, 16)
        return int(width * height)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30:
        size = _webp_size(data)
        return 0 if size is None else size[0] * size[1]
    return 0


def _declared_by_jpeg(data: bytes) -> int | None:
    position = 2
    for _ in range(_PARTS_BEFORE_SIZE):
        position = data.find(b"\xff", position) + 1
        if position == 0 or position + 8 > len(data):
            return 0
        marker = data[position]
        if marker in _WITHOUT_SEGMENT:
            continue
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, position + 4)
            return int(width * height)
        if marker == _START_OF_SCAN:
            return 0
        position += 1 + int.from_bytes(data[position + 1 : position + 3])
    return None


def _truncated(name: str) -> InvalidImage:
    return InvalidImage("truncated", f"the {name} data ends before the image does")


def _corrupt(name: str) -> InvalidImage:
    return InvalidImage("corrupt", f"the {name} data is malformed")


def _too_many_parts(name: str) -> InvalidImage:
    return InvalidImage("unsupported", f"the {name} data is split into too many parts")


# What may follow a byte 0xFF and has no segment: a stuffed zero, a fill byte, TEM, RST0 to RST7.
_WITHOUT_SEGMENT = {0x00, 0xFF, 0x01, *range(0xD0, 0xD8)}
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_EXIF_SEGMENT = 0xE1
# Huffman, arithmetic and quantisation tables, restart interval, and JFIF and Adobe, the two
# application segments that say how colours are stored. A list of what to keep, not of what to
# drop: Pillow looks for a frame inside segments that it does not know.
_KEPT = _START_OF_FRAME | {_START_OF_SCAN, 0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}
# What ends the data of a scan, where a byte 0xFF of data is stored as 0xFF00: the end of the image,
# or a segment that the decoder reads or skips by its length (tables, DNL, applications, comments,
# the next scan). Found by a search in C: restart markers may be as many as blocks.
_AFTER_SCAN_DATA = re.compile(rb"\xff[\xc4\xcc\xd9-\xdd\xe0-\xef\xfe]")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and segments, from the length field on; the first scan holds the rest of the image.

    Nothing behind the end of the image is looked at.
    """
    position = 2
    for _ in range(_MAX_PARTS):
        position = data.find(b"\xff", position) + 1
        if position == 0 or position + 3 > len(data):
            raise _truncated("JPEG")
        marker = data[position]
        if marker in _WITHOUT_SEGMENT:
            continue
        if marker in (_START_OF_IMAGE, _END_OF_IMAGE):
            raise _corrupt("JPEG")
        start = position + 1
        if marker == _START_OF_SCAN:
            yield marker, data[start : _end_of_jpeg(data, start)]
            return
        (length,) = struct.unpack_from(">H", data, start)
        position = start + length
        if length < 2:
            raise _corrupt("JPEG")
        yield marker, data[start:position]
    raise _too_many_parts("JPEG")


def _end_of_jpeg(data: bytes, position: int) -> int:
    """Where the image ends whose first scan has its length field at a position."""
    scans = 1
    for _ in range(_MAX_PARTS):
        after = position + int.from_bytes(data[position : position + 2])
        # Damage in the data of a scan may look like a segment. One that is longer than the file is
        # none: the decoder tells how much of the image is left.
        found = _AFTER_SCAN_DATA.search(data, after if after < len(data) else position)
        if found is None:
            raise _truncated("JPEG")
        position = found.end()
        marker = data[position - 1]
        if marker == _END_OF_IMAGE:
            return position
        scans += marker == _START_OF_SCAN
        if scans > _MAX_SCANS:
            break
    raise _too_many_parts("JPEG")


def _read_jpeg(data: bytes) -> Container:
    """Read the segments up to the first scan (ITU-T T.81, annex B)."""
    kept = [data[:2]]
    frame = b""
    exif = b""
    for marker, segment in _jpeg_segments(data):
        if marker in _START_OF_FRAME and not frame:
            frame = segment
        if marker in _KEPT:
            kept.append(b"\xff%c%b" % (marker, segment))
        elif marker == _EXIF_SEGMENT and not exif and segment.startswith(_EXIF_PREFIX, 2):
            exif = segment[2:]
    *header, _ = kept
    if len(frame) < 8:
        raise _corrupt("JPEG")
    if sum(map(len, header)) > _MAX_HEADER_BYTES:
        raise _too_many_parts("JPEG")
    height, width = struct.unpack_from(">HH", frame, 3)
    return Container("JPEG", width, height, _orientation(exif), b"".join(kept))


def _read_png(data: bytes) -> Container:
    """Walk the chunks (W3C PNG, third edition, section 5).

    Without its animation chunks an APNG is its first frame, and without `tRNS` the colours of
    an image are those under its transparency.
    """
    kept = [_PNG_SIGNATURE]
    exif = b""
    position = len(_PNG_SIGNATURE)
    for _ in range(_MAX_PARTS):
        if position + 8 > len(data):
            raise _truncated("PNG")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise _truncated("PNG")
        # One header, and first: a second would let the decoder see another size.
        if (kind == b"IHDR") != (len(kept) == 1) or (kind == b"IHDR" and length != 13):
            raise _corrupt("PNG")
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[position:end])
        elif kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        if kind == b"IEND":
            break
        position = end
    else:
        raise _too_many_parts("PNG")
    width, height = struct.unpack_from(">II", kept[1], 8)
    return Container("PNG", width, height, _orientation(exif), b"".join(kept))


def _read_webp(data: bytes) -> Container:
    """Read the canvas size from the first chunk, and find the EXIF chunk (RFC 9649).

    It is passed on with its metadata, which does no harm in this decoder.
    """
    size = int.from_bytes(data[4:8], "little")
    if 8 + size > len(data):
        raise _truncated("WebP")
    data = data[: 8 + size + size % 2]
    if len(data) < 30:
        raise _truncated("WebP")
    size_of_canvas = _webp_size(data)
    if size_of_canvas is None:
        raise _corrupt("WebP")
    exif = _webp_exif(data) if data[12:16] == b"VP8X" else b""
    return Container("WEBP", *size_of_canvas, _orientation(exif), data)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """`(W, H)` that the first chunk gives, pixels; `None` where it is not a picture."""
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little")
        height = int.from_bytes(data[27:30], "little")
        return width + 1, height + 1
    return None


def _webp_exif(data: bytes) -> bytes:
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > len(data):
            return b""
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            return data[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    raise _too_many_parts("WebP")


_TIFF_BYTE_ORDER = {b"II*\0": "<", b"MM\0*": ">"}
_ORIENTATION_TAG, _SHORT = 0x0112, 3


def _orientation(exif: bytes) -> int:
    """Orientation in the first directory of EXIF data.

    Anything malformed counts as upright: metadata is no reason to refuse an image.
    """
    tiff = exif.removeprefix(_EXIF_PREFIX)
    order = _TIFF_BYTE_ORDER.get(tiff[:4])
    if order is None:
        return 1
    entry = f"{order}HHIH"
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for index in range(count):
            tag, kind, _, value = struct.unpack_from(entry, tiff, directory + 2 + 12 * index)
            if tag == _ORIENTATION_TAG and kind == _SHORT and 1 <= value <= 8:
                return int(value)
    except struct.error:
        pass
    return 1
