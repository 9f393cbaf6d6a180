"""HTTP requests to images and options, within the limits of bytes and time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service.byte_budget import HeldBytes
from service.errors import (
    Cancelled,
    DeadlineExceeded,
    ImageTooLarge,
    InvalidOption,
    InvalidRequest,
    UnsupportedMediaType,
    quoted,
)
from service.priority import Priority
from service.settings.limits import Limits
from service.tasks.core import Options, Upload
from service.transport import priority
from service.transport.http import content_coding
from service.transport.http.form_body import boundary_of, read_form
from service.transport.http.json_body import MAX_OPTIONS, read_json
from service.transport.http.schema import ImagesBody

T = TypeVar("T")

# The bytes decide what an image is, not its media type; some of these types are old systems'.
RAW_TYPES = (
    "image/jpeg", "image/png", "image/webp", "image/jpg", "image/pjpeg", "image/x-png",
    "application/octet-stream",
)  # fmt: skip
PARSED_AT_ONCE_BYTES = 256 * 1024  # which takes a few milliseconds


class TaskOptionsBody(Protocol):
    """The options of a task as its requests give them: a pydantic model."""

    @classmethod
    def of_text(cls, given: dict[str, str], /) -> Self:
        """From a query or the fields of a form."""

    @classmethod
    def model_validate_json(cls, json_data: bytes, /, *, strict: bool) -> Self: ...  # noqa: D102

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...  # noqa: D102

    @property
    def model_fields_set(self) -> set[str]: ...  # noqa: D102

    def model_copy(self, *, update: dict[str, Any]) -> Self: ...  # noqa: D102

    def options(self) -> Options:
        """These options in the form that the core takes."""


@dataclass(frozen=True)
class Form:
    """What the requests of a task look like.

    Attributes:
        options: the options of a query, of form fields or of a JSON body.
        json: a JSON body.
    """

    options: type[TaskOptionsBody]
    json: type[ImagesBody]


@dataclass(frozen=True)
class Head:
    """What is known of a request before its body is read.

    Attributes:
        kind: media type of the body.
        boundary: of the parts of a multipart body.
        coding: how the body is compressed; empty if it is not.
        length: of the body as announced, bytes; 0 where it is not.
        limit: of the body, bytes.
        query: the options that the query gives.
        options: those of the query, in the form that the core takes, and the class that the
            header names.
        began: when the request was received, loop time, seconds.
    """

    kind: str
    boundary: bytes
    coding: str
    length: int
    limit: int
    query: TaskOptionsBody
    options: Options
    began: float

    @property
    def names_model(self) -> bool:
        """Whether the model is known: the body cannot name another one."""
        return self.kind in RAW_TYPES or "model" in self.query.model_fields_set


@dataclass(frozen=True)
class Body:
    """What a request holds."""

    uploads: Sequence[Upload]
    options: Options
    size: int  # bytes


def read_head(request: Request, limits: Limits, form: Form) -> Head:
    """Understand a request as far as that needs no body.

    Raises:
        UnsupportedMediaType: a content type, or a coding, that is not read here.
        ImageTooLarge: more bytes are announced than allowed.
        InvalidRequest: a multipart body without a boundary.
        InvalidOption: an option of the query, or a priority, that cannot be used.
    """
    content_type = request.headers.get("content-type") or "application/octet-stream"
    kind, boundary = content_type.partition(";")[0].strip().lower(), b""
    if kind == "multipart/form-data":
        boundary = boundary_of(content_type)
    elif kind not in RAW_TYPES and kind != "application/json":
        raise UnsupportedMediaType(
            f"this server does not read the content type {quoted(kind)}; send "
            f"{', '.join(RAW_TYPES)}, multipart/form-data or application/json"
        )
    coding = content_coding.choose(request.headers.getlist("content-encoding"))
    limit = limits.max_image_bytes if kind in RAW_TYPES else limits.max_body_bytes
    length = int(request.headers.get("content-length", 0))
    if length > limit:
        raise too_large(limit)
    query = _checked(form.options.of_text, _read_query(request.scope["query_string"]))
    options = _lowered(query.options(), priority.read(request.headers.get(priority.HEADER)))
    began = asyncio.get_running_loop().time()
    return Head(kind, boundary, coding, length, limit, query, options, began)


async def read_body(
    request: Request,
    head: Head,
    form: Form,
    limits: Limits,
    held: HeldBytes,
) -> Body:
    """Read the rest of a request, until its deadline.

    Args:
        request: of which the head was read.
        head: of the request.
        form: of the requests of the task.
        limits: of a request.
        held: what the request holds of the budget: as much as its head announces, and in the end
            the bytes of its images.

    Raises:
        ImageTooLarge: more bytes than allowed, or than that when decompressed.
        Overloaded: more bytes are in flight than the budget allows.
        DeadlineExceeded: the deadline passed before the end of the request.
        Cancelled: the client left before that.
        InvalidRequest: malformed JSON, multipart or compressed data.
        InvalidOption: an option that cannot be used.
    """
    try:
        async with asyncio.timeout_at(_deadline(head, head.options, limits)):
            data = await receive(request, head.coding, head.limit, held)
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the request was received") from None
    except ClientDisconnect:
        raise Cancelled("the client left before the end of its request") from None
    options, size = head.options, len(data)
    uploads: Sequence[Upload]
    if head.kind in RAW_TYPES:
        uploads = [bytes(data)]
    elif head.kind == "application/json":
        # The images are in memory beside their text; a request that is alone has room for both.
        held.grow(min(size * 3 // 4, held.free))
        uploads, written = await _parse(lambda: read_json(data, limits.max_images), size)
        body = _checked(form.options.model_validate_json, written, strict=True)
        options = _merge(head.query, body).options()
    else:
        uploads, fields = await _parse(
            lambda: read_form(data, head.boundary, limits.max_images), size
        )
        options = _merge(head.query, _checked(form.options.of_text, fields)).options()
    decoded = sum(len(upload) for upload in uploads if isinstance(upload, bytes))
    held.give_back(max(0, held.size - decoded))
    left_s = _deadline(head, options, limits) - asyncio.get_running_loop().time()
    if left_s <= 0:
        raise DeadlineExceeded("the deadline passed before the request was received")
    options = _lowered(options, head.options.priority)
    return Body(uploads, replace(options, timeout_s=left_s), size)


async def receive(request: Request, coding: str, limit: int, held: HeldBytes) -> bytearray:
    """Read the body of a request.

    Args:
        request: of which the head was read.
        coding: how the body is compressed; empty if it is not.
        limit: of the body, and of its content, bytes.
        held: what the request holds of the budget; grows with the body.

    Raises:
        ImageTooLarge: more bytes than allowed, or than that when decompressed.
        Overloaded: more bytes are in flight than the budget allows, or the body gave way to others.
        InvalidRequest: what was sent is not of that coding.
        ClientDisconnect: the client left before the end.
    """
    chunks = _counted(request.stream(), held)
    if coding:
        chunks = content_coding.decompressed(chunks, coding, limit)
    body = bytearray()
    async with held.coming():
        async for chunk in chunks:
            size = len(body) + len(chunk)
            if size > limit:
                raise too_large(limit)
            if size > held.size:
                held.grow(size - held.size)
            body += chunk
    return body


async def _counted(chunks: AsyncIterator[bytes], held: HeldBytes) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        held.came(len(chunk))
        yield chunk


def _lowered(options: Options, named: Priority) -> Options:
    """Options of a request that also names a class in its header."""
    return replace(options, priority=priority.lower(options.priority, named))


def too_large(limit: int) -> ImageTooLarge:
    """Why a body is refused that has more bytes than allowed."""
    return ImageTooLarge("too_large", f"the body has more than {limit} bytes")


def _deadline(head: Head, options: Options, limits: Limits) -> float:
    """When the answer to a request is of no use any more, counted from its head; loop time."""
    timeout_s = options.timeout_s
    return head.began + (limits.default_timeout_s if timeout_s is None else timeout_s)


async def _parse(work: Callable[[], T], size: int) -> T:
    # Off the event loop where it takes longer than a few milliseconds.
    return work() if size <= PARSED_AT_ONCE_BYTES else await asyncio.to_thread(work)


def _read_query(query: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(
            query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_OPTIONS
        )
    except ValueError as error:
        raise InvalidOption(f"the query has more than {MAX_OPTIONS} options") from error
    given = dict(pairs)
    if len(given) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidOption(f"{quoted(twice)} is given twice in the query")
    return given


def _merge(query: TaskOptionsBody, body: TaskOptionsBody) -> TaskOptionsBody:
    given = body.model_fields_set
    if twice := query.model_fields_set & given:
        raise InvalidOption(f"{', '.join(sorted(twice))} is given in the query and in the body")
    return query.model_copy(update={name: getattr(body, name) for name in given})


def _checked(validate: Callable[..., T], given: Any, **how: bool) -> T:
    try:
        return validate(given, **how)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        message = "; ".join(
            f"{quoted('.'.join(map(str, fault['loc'])))}: "
            + ("there is no such option" if fault["type"] == "extra_forbidden" else fault["msg"])
            for fault in faults[:4]
        )
        if faults[0]["type"] == "json_invalid":
            raise InvalidRequest(f"the options of the body are not JSON: {message}") from error
        raise InvalidOption(message) from error
