"""What the document of the HTTP interface says beside the schemas of its JSON."""

from http import HTTPStatus
from typing import Any

from service.transport.http.schema import ErrorAnswer, HealthAnswer
from service.transport.http.task import HttpTask
from service.transport.http.uploads import RAW_TYPES


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


_RETRY_AFTER = {"Retry-After": _header("Seconds after which to try again.", "integer")}
_SERVER_TIMING = {"Server-Timing": _header("The longest time in each stage, milliseconds.")}
_ACCEPT_ENCODING = {"Accept-Encoding": _header("The codings that are read, if that is what is.")}
_REQUEST_ID = {"X-Request-Id": _header("That of the request, or a new one.")}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "headers": _REQUEST_ID | headers,
        **({"model": ErrorAnswer} if status >= HTTPStatus.BAD_REQUEST else {}),
    }
    for status, (description, headers) in {
        200: ("The answer; each image of several has its own status.", _SERVER_TIMING),
        400: ("The request or its one image cannot be used.", {}),
        404: ("No model of that name is served here.", {}),
        408: ("The request came too slowly.", {}),
        413: ("Too many bytes or pixels.", {}),
        414: ("Too many bytes in the URL.", {}),
        415: ("A content type, or a coding, that is not read here.", _ACCEPT_ENCODING),
        429: ("The queue is full, or too much is being received.", _RETRY_AFTER),
        431: ("Too many headers, or too many bytes in them.", {}),
        500: ("The image failed on the device.", {}),
        503: ("This replica is starting or leaving, or its device is lost.", _RETRY_AFTER),
        504: ("The deadline passed.", {}),
    }.items()
}


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The descriptions of these statuses."""
    return {status: RESPONSES[status] for status in statuses}


OK: dict[int | str, dict[str, Any]] = {
    200: {"description": "They are these.", "headers": _REQUEST_ID}
}
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
HEALTH: dict[str, Any] = {
    "tags": ["health"],
    "response_model": HealthAnswer,
    "responses": {
        200: {"description": "It is so.", "headers": _REQUEST_ID},
        503: {"description": "It is not so.", "headers": _REQUEST_ID, "model": HealthAnswer},
    },
}


def request_schema(task: HttpTask[Any]) -> dict[str, Any]:
    """OpenAPI of the three kinds of body, and of the options in the query."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    options = {
        name: _as_text(schema)
        for name, schema in task.form.options.model_json_schema()["properties"].items()
    }
    multipart = {
        "type": "object",
        "properties": {
            "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
            **options,
        },
        "required": ["file"],
        "additionalProperties": False,
    }
    # Lists are separated by commas.
    as_one = {"style": "form", "explode": False}
    lists = {name: as_one for name, schema in options.items() if schema.get("type") == "array"}
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, **lists.get(name, {})}
            for name, schema in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                **dict.fromkeys(RAW_TYPES, binary),
                "multipart/form-data": {"schema": multipart, "encoding": lists},
                "application/json": {
                    "schema": task.form.json.model_json_schema(),
                    "example": task.example,
                },
            },
        },
    }


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Of an option in a query or a form, where there is no null."""
    present = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return rest | present[0] if present else schema
