"""What the document of the HTTP interface says beside the schemas of its JSON."""

from typing import Any

from service.errors import all_errors
from service.tasks.drawing import MEDIA_TYPES
from service.transport.http.schema import ErrorAnswer, HealthAnswer
from service.transport.http.uploads import RAW_TYPES, Form


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


_RETRY_AFTER = {"Retry-After": _header("Seconds after which to try again.", "integer")}
SERVER_TIMING = {"Server-Timing": _header("The longest time in each stage, milliseconds.")}
_ACCEPT_ENCODING = {"Accept-Encoding": _header("The codings that this server reads.")}
REQUEST_ID = {"X-Request-Id": _header("The id that the request came with, or a new one.")}
_CHALLENGE = {"WWW-Authenticate": _header("How to show a key.")}
_ERROR_HEADERS = {401: _CHALLENGE, 415: _ACCEPT_ENCODING, 429: _RETRY_AFTER, 503: _RETRY_AFTER}
_NOBODY_SEES = 499  # the caller has left


def _errors() -> dict[int | str, dict[str, Any]]:
    """The status of every failure, described by all the failures that have it."""
    meanings: dict[int, list[str]] = {}
    for error in all_errors():
        if error.http_status != _NOBODY_SEES:
            sentence = (error.__doc__ or "").partition("\n")[0]
            meanings.setdefault(int(error.http_status), []).append(f"`{error.code}`: {sentence}")
    return {
        status: {
            "description": " ".join(meanings[status]),
            "headers": REQUEST_ID | _ERROR_HEADERS.get(status, {}),
            "model": ErrorAnswer,
        }
        for status in sorted(meanings)
    }


RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The results; each image of several has its own status.",
        "headers": REQUEST_ID | SERVER_TIMING,
    },
    **_errors(),
}


_PICTURE = {"schema": {"type": "string", "format": "binary"}}
PICTURES: dict[int | str, dict[str, Any]] = RESPONSES | {
    200: {
        "description": "The picture.",
        "headers": REQUEST_ID | SERVER_TIMING,
        "content": dict.fromkeys(MEDIA_TYPES.values(), _PICTURE),
    }
}


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The descriptions of some statuses."""
    return {status: RESPONSES[status] for status in statuses}


OK: dict[int | str, dict[str, Any]] = {
    200: {"description": "The models that were asked for.", "headers": REQUEST_ID}
}
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
HEALTH: dict[str, Any] = {
    "tags": ["health"],
    "response_model": HealthAnswer,
    "responses": {
        200: {
            "description": "The replica is in the state that was asked for.",
            "headers": REQUEST_ID,
        },
        503: {
            "description": "The replica is not in the state that was asked for.",
            "headers": REQUEST_ID,
            "model": HealthAnswer,
        },
    },
}


def request_schema(form: Form, example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of the three kinds of body, and of the options in the query."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    options = {
        name: _as_text(schema)
        for name, schema in form.options.model_json_schema()["properties"].items()
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
                    "schema": form.json.model_json_schema(),
                    "example": example,
                },
            },
        },
    }


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an option in a query or a form, where there is no null."""
    present = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return rest | present[0] if present else schema
