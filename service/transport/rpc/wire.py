"""Messages of protocol buffers as bytes, before anything is built of them.

Only tags and lengths are read here: enough to count what a message holds, and to find its images,
at a cost that a limit bounds however many things a message claims to hold.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from service.errors import InvalidRequest, TooManyImages

AnyMessage = TypeVar("AnyMessage", bound=Message)
# Where something begins and ends in a message, bytes.
Span = tuple[int, int]

# Beside images a message holds options and the names of classes.
MOST_FIELDS = 10_000
MOST_OTHER_BYTES = 2**20
_MOST_FIELD_NUMBER = 2**29

_VARINT, _FIXED64, _LENGTH, _GROUP, _END_OF_GROUP, _FIXED32 = range(6)
# Of the numbers of protocol buffers, bytes; those of 32 bits are tags and lengths.
_LONGEST_VARINT, _LONGEST_VARINT_32 = 10, 5


def parse(kind: type[AnyMessage], message: bytes) -> AnyMessage:
    """Parse a message without images.

    Raises:
        InvalidRequest: it is malformed or too large.
    """
    if len(message) > MOST_OTHER_BYTES:
        raise InvalidRequest(
            f"the message holds {len(message)} bytes beside images; the limit is {MOST_OTHER_BYTES}"
        )
    return _parsed(kind, message)


def _parsed(kind: type[AnyMessage], message: bytes) -> AnyMessage:
    try:
        return kind.FromString(message)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise InvalidRequest(f"the message is malformed: it is not a {name}") from None


class Received:
    """A message with images, as it was received.

    Attributes:
        size: bytes.
    """

    def __init__(self, message: bytes) -> None:
        self.size = len(message)
        self._message = message
        self._spans: list[Span] = [(0, self.size)]  # of the part that is of interest
        self._fields_left = MOST_FIELDS

    def enter(self, field: int, kind: type[AnyMessage]) -> AnyMessage:
        """Go on with a message that is a field of this one.

        Returns:
            What stands beside that field.

        Raises:
            InvalidRequest: what stands beside the field is malformed or too large.
        """
        inner, others = self._find(field, None)
        outer = parse(kind, self._join(others))
        self._spans = inner
        return outer

    def take(self, field: int, kind: type[AnyMessage], most: int) -> tuple[AnyMessage, list[bytes]]:
        """Take out the images, and let go of the message.

        Args:
            field: of the images.
            kind: what the message is.
            most: images that it may hold.

        Returns:
            The message without its images, and those.

        Raises:
            InvalidRequest: the message is malformed, or holds too much beside its images.
            TooManyImages: more than `most`.
        """
        spans, others = self._find(field, most)
        rest = parse(kind, self._join(others))
        images = [self._message[begin:end] for begin, end in spans]
        self._message = b""
        return rest, images

    def take_tensors(
        self, field: int, nested: Mapping[int, int | None], kind: type[AnyMessage]
    ) -> tuple[AnyMessage, list[memoryview]]:
        """Take out tensors that are bytes, and let go of the message but for those.

        Args:
            field: of the tensors.
            nested: the fields whose own fields are counted as well, each with the one in it of
                which the same is true.
            kind: what the message is.

        Returns:
            The message without those tensors, which may hold others, and those.

        Raises:
            InvalidRequest: the message is malformed, or has too many fields.
        """
        spans, others = self._find(field, None)
        for begin, end in others:
            self._count_nested(begin, end, nested)
        rest = _parsed(kind, self._join(others))
        view = memoryview(self._message)
        self._message = b""
        return rest, [view[begin:end] for begin, end in spans]

    def _count_nested(self, begin: int, end: int, nested: Mapping[int, int | None]) -> None:
        for field, _, content, stop in self._fields(begin, end):
            if field in nested:
                deeper = nested[field]
                for inner, _, inner_content, inner_stop in self._fields(content, stop):
                    self._count_field()
                    if inner and inner == deeper:
                        for _ in self._fields(inner_content, inner_stop):
                            self._count_field()

    def _find(self, wanted: int, most: int | None) -> tuple[list[Span], list[Span]]:
        """Where the contents of a field are, and where everything else is."""
        found: list[Span] = []
        others: list[Span] = []
        for begin, end in self._spans:
            kept = begin
            for field, start, content, stop in self._fields(begin, end):
                if field != wanted or most is None:
                    self._count_field()
                if field != wanted:
                    continue
                if most is not None and len(found) == most:
                    raise TooManyImages(f"the request holds more than {most} images")
                found.append((content, stop))
                others.append((kept, start))
                kept = stop
            others.append((kept, end))
        return found, others

    def _count_field(self) -> None:
        if not self._fields_left:
            raise InvalidRequest(f"the message holds more than {MOST_FIELDS} fields beside images")
        self._fields_left -= 1

    def _fields(self, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The number of each field, where it and its content begin, and where both end.

        Fields that have no length, and all within groups, have the number 0.
        """
        depth = 0
        while position < end:
            start = position
            tag, position = self._varint(position, end, _LONGEST_VARINT_32)
            field, kind = tag >> 3, tag & 7
            if not 0 < field < _MOST_FIELD_NUMBER:
                raise InvalidRequest("the message is malformed: a field has no number")
            content = position
            if kind == _LENGTH:
                length, content = self._varint(position, end, _LONGEST_VARINT_32)
                position = content + length
            elif kind == _VARINT:
                _, position = self._varint(position, end, _LONGEST_VARINT)
            elif kind == _FIXED64:
                position += 8
            elif kind == _FIXED32:
                position += 4
            elif kind == _GROUP:
                depth += 1
            elif kind == _END_OF_GROUP and depth:
                depth -= 1
            else:
                raise InvalidRequest("the message is malformed: a field is of no known type")
            if position > end:
                raise InvalidRequest("the message is malformed: a field goes on behind the end")
            yield (field if kind == _LENGTH and not depth else 0), start, content, position
        if depth:
            raise InvalidRequest("the message is malformed: a group has no end")

    def _varint(self, position: int, end: int, longest: int) -> tuple[int, int]:
        """A number, and where it ends."""
        value = 0
        for index, byte in enumerate(self._message[position : min(end, position + longest)]):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, position + index + 1
        raise InvalidRequest("the message is malformed: a number has no end")

    def _join(self, spans: list[Span]) -> bytes:
        return b"".join(self._message[begin:end] for begin, end in spans)
