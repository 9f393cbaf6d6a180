"""Bodies without images and tensors: JSON of a few parameters."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from service.errors import Cancelled, InvalidRequest
from service.transport.http.uploads import too_large

Body = TypeVar("Body", bound=BaseModel)

_MOST_BYTES = 64 * 1024


async def read_small(request: Request, kind: type[Body]) -> Body:
    """The body of a request; an empty one holds nothing.

    Raises:
        InvalidRequest: it is something else.
        ImageTooLarge: it has more than 64 KiB.
        Cancelled: the client left before its end.
    """
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BYTES:
                raise too_large(_MOST_BYTES)
    except ClientDisconnect:
        raise Cancelled("the client left before the end of its request") from None
    try:
        return kind.model_validate_json(body.strip() or b"{}")
    except ValidationError as faults:
        fault = faults.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise InvalidRequest(
            f"the body is not what the protocol has here: {where + ': ' if where else ''}"
            f"{fault['msg']}"
        ) from None
