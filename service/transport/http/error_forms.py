"""How a failure looks in JSON: as in our own interface, or in the Open Inference Protocol."""

from json import dumps

from service.transport.http.schema import ErrorAnswer, ErrorBody

_OPEN_INFERENCE = "/v2"


def is_open_inference(path: str) -> bool:
    """Whether a path is one of the Open Inference Protocol, whose errors are sentences."""
    return path.startswith(_OPEN_INFERENCE) and path[len(_OPEN_INFERENCE) :][:1] in ("", "/", "?")


def error_json(body: ErrorBody, *, open_inference: bool) -> bytes:
    """The JSON of a failure."""
    if open_inference:
        return dumps({"error": body.message}, ensure_ascii=False).encode()
    return ErrorAnswer(error=body).model_dump_json().encode()
