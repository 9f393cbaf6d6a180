"""Bodies of HTTP requests to images and options, within the limits of bytes."""

import asyncio
import binascii
import sys
from base64 import b64decode
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.core import Options, Upload
from service.errors import (
    Cancelled,
    ImageTooLarge,
    InvalidImage,
    InvalidOption,
    InvalidRequest,
    TooManyImages,
    UnsupportedMediaType,
)
from service.settings import Limits
from service.transport.schema import ImagesBody

TaskOptions = TypeVar("TaskOptions", bound=Options)
Options_co = TypeVar("Options_co", bound=Options, covariant=True)

RAW_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
_MAX_FORM_FIELDS = 16
_PARSED_AT_ONCE_BYTES = 2**20


class TaskOptionsBody(Protocol[Options_co]):
    """The options of a task as its requests give them."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...  # noqa: D102

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...  # noqa: D102

    def options(self) -> Options_co:
        """The same for the core."""


@dataclass(frozen=True)
class Form(Generic[TaskOptions]):
    """What the requests of a task look like.

    Attributes:
        options: the options of a query or of form fields.
        json: a JSON body.
    """

    options: type[TaskOptionsBody[TaskOptions]]
    json: type[ImagesBody]


@dataclass(frozen=True)
class Body(Generic[TaskOptions]):
    """What a request holds."""

    uploads: list[Upload]
    options: TaskOptions
    size: int  # bytes


async def read_body(request: Request, limits: Limits, form: Form[TaskOptions]) -> Body[TaskOptions]:
    """Read one request.

    Raises:
        UnsupportedMediaType: a content type that is not read here.
        ImageTooLarge: more bytes than allowed; where the length is announced, nothing was read.
        InvalidRequest: malformed JSON or multipart, or an option that cannot be used.
    """
    content_type = request.headers.get("content-type", "application/octet-stream")
    kind = content_type.partition(";")[0].strip().lower()
    query = dict(request.query_params)
    if len(query) < len(request.query_params.multi_items()):
        raise InvalidOption("an option is given twice in the query")
    if kind in RAW_TYPES:
        data = await _read(request, limits.max_image_bytes)
        return Body([data], _options(form, query, {}), len(data))
    if kind == "application/json":
        data = await _read(request, limits.max_body_bytes)
        # Off the event loop: megabytes of base64 take tens of milliseconds.
        uploads, given = await asyncio.to_thread(_parse_json, data, form.json)
        return Body(uploads, _options(form, query, given), len(data))
    if kind == "multipart/form-data":
        data = await _read(request, limits.max_body_bytes)
        uploads, given = await _parse_multipart(request, data, limits)
        return Body(uploads, _options(form, query, given), len(data))
    raise UnsupportedMediaType(
        f"content type {kind!r} is not read here; send {', '.join(RAW_TYPES)}, "
        "multipart/form-data or application/json"
    )


async def _read(request: Request, limit: int) -> bytes:
    too_large = ImageTooLarge("too_large", f"the body has more than {limit} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
    except ClientDisconnect:
        raise Cancelled("the client left before the end of its request") from None
    return bytes(body)


def _parse_json(data: bytes, body: type[ImagesBody]) -> tuple[list[Upload], dict[str, Any]]:
    try:
        parsed = body.model_validate_json(data)
    except ValidationError as error:
        raise InvalidRequest(describe(error)) from error
    if parsed.image is not None and parsed.images is not None:
        raise InvalidRequest("the body has both image and images; give one of them")
    encoded = [parsed.image] if parsed.image is not None else parsed.images or []
    given = parsed.model_dump(exclude={"image", "images"}, exclude_unset=True)
    return [_from_base64(text) for text in encoded], given


def _from_base64(text: str) -> Upload:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return InvalidImage("bad_base64", f"the image is not base64: {error}")


class _InMemoryParser(MultiPartParser):
    # The body is in memory already and bounded; a disk may be read-only or full.
    spool_max_size = sys.maxsize


async def _parse_multipart(
    request: Request, data: bytes, limits: Limits
) -> tuple[list[Upload], dict[str, Any]]:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), _PARSED_AT_ONCE_BYTES):
            yield data[start : start + _PARSED_AT_ONCE_BYTES]
            await asyncio.sleep(0)  # other requests get their turn

    parser = _InMemoryParser(
        request.headers, chunks(), max_files=limits.max_images, max_fields=_MAX_FORM_FIELDS
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise TooManyImages(
                f"the request holds more than {limits.max_images} images"
            ) from error
        raise InvalidRequest(f"the multipart body cannot be read: {error.message}") from error
    except (KeyError, ValueError) as error:
        raise InvalidRequest("the multipart body has no boundary") from error
    uploads: list[Upload] = []
    fields: dict[str, Any] = {}
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            uploads.append(await part.read())
        elif name in fields:
            raise InvalidOption(f"{name} is given twice in the form")
        else:
            fields[name] = part
    return uploads, fields


def _options(form: Form[TaskOptions], query: dict[str, Any], given: dict[str, Any]) -> TaskOptions:
    if twice := query.keys() & given.keys():
        raise InvalidOption(f"{', '.join(sorted(twice))} is given in the query and in the body")
    try:
        return form.options.model_validate(query | given).options()
    except ValidationError as error:
        raise InvalidOption(describe(error)) from error


def describe(error: ValidationError) -> str:
    """What is wrong with which field, without the input itself."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, fault['loc'])) or 'body'}: {fault['msg']}" for fault in faults[:4]
    )
