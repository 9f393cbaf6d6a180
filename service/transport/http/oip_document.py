"""What the document of the HTTP interface says of the Open Inference Protocol."""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from service.transport.http.openapi import REQUEST_ID, RESPONSES, SERVER_TIMING

MODEL = "/v2/models/{model}"
VERSION = MODEL + "/versions/{version}"


def names_of(request: Request) -> tuple[str, str]:
    """The model and the version of a path, empty where it has none."""
    return request.path_params.get("model", ""), request.path_params.get("version", "")


_NAME = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of JSON before the tensors; 0: the body is an image.",
    "schema": {"type": "integer", "minimum": 0},
}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}},
    "required": ["error"],
}
_OBJECT = {"type": "object"}
_TENSOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "parameters": _OBJECT,
        "data": {"type": "array", "items": {}},
    },
    "required": ["name", "shape", "datatype"],
}
_OUTPUT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parameters": _OBJECT},
    "required": ["name"],
}
_REQUEST = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "parameters": _OBJECT,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _OUTPUT},
    },
    "required": ["inputs"],
}
_RESPONSE = {
    "type": "object",
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": _TENSOR},
    },
    "required": ["model_name", "id", "outputs"],
}
_BINARY = {"type": "string", "format": "binary"}


def _responses(
    schema: dict[str, Any], *statuses: int, headers: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    answer = {
        "description": "The answer.",
        "headers": headers or REQUEST_ID,
        "content": {"application/json": {"schema": schema}},
    }
    errors: dict[int | str, dict[str, Any]] = {
        status: {
            "description": RESPONSES[status]["description"],
            "headers": RESPONSES[status]["headers"],
            "content": {"application/json": {"schema": _ERROR}},
        }
        for status in statuses
    }
    return {200: answer} | errors


def _route(responses: dict[int | str, dict[str, Any]], **extra: Any) -> dict[str, Any]:
    return {
        "tags": ["open inference protocol"],
        "response_class": JSONResponse,
        "response_model": None,
        "responses": responses,
        "openapi_extra": extra,
    }


def _state(*flags: str) -> dict[str, Any]:
    return {"type": "object", "properties": {flag: {"type": "boolean"} for flag in flags}}


_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "The replica is not in the state that was asked for.",
        "headers": REQUEST_ID,
        "content": {"application/json": {"schema": _state("live", "ready")}},
    }
}
HEALTH = _route(_responses(_state("live", "ready")) | _UNHEALTHY)
METADATA_OF_SERVER = _route(_responses(_OBJECT, 401, 403, 429, 500))
METADATA = _route(_responses(_OBJECT, 401, 403, 404, 429, 500, 503), parameters=[_NAME])
MODEL_READY = _route(_responses(_state("ready"), 401, 403, 404, 429, 500), parameters=[_NAME])
MODEL_READY["responses"] |= _UNHEALTHY
INFER = _route(
    _responses(
        _RESPONSE,
        *(status for status in RESPONSES if isinstance(status, int) and status != 200),
        headers=REQUEST_ID | SERVER_TIMING,
    ),
    parameters=[_NAME, _LENGTH],
    requestBody={
        "required": True,
        "content": {
            "application/json": {"schema": _REQUEST},
            "application/octet-stream": {"schema": _BINARY},
        },
    },
)
INFER["responses"][200]["content"]["application/octet-stream"] = {"schema": _BINARY}
CONFIG = METADATA
STATISTICS = _route(_responses(_OBJECT, 401, 403, 404, 429, 500, 503))
_CHANGED = (400, 401, 403, 404, 408, 413, 429, 500, 503)
INDEX = _route(
    _responses({"type": "array", "items": _OBJECT}, *_CHANGED),
    requestBody={"content": {"application/json": {"schema": _OBJECT}}},
)
REPOSITORY_CHANGE = _route(
    _responses(_OBJECT, *_CHANGED),
    parameters=[_NAME],
    requestBody={"content": {"application/json": {"schema": _OBJECT}}},
)
