"""The answers to requests that failed as a whole."""

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from service.errors import ServiceError, UnsupportedCoding, quoted
from service.transport.http import content_coding
from service.transport.http.context import request_id
from service.transport.http.error_forms import error_json, is_open_inference
from service.transport.http.schema import ErrorBody, error_body, error_headers


def show_failures(app: FastAPI) -> None:
    """Give every failure its status and its JSON."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return service_error(request, error)


def service_error(request: Request, error: ServiceError) -> Response:
    """The answer to a request that failed."""
    headers = error_headers(error)
    if isinstance(error, UnsupportedCoding):
        headers["Accept-Encoding"] = ", ".join(content_coding.READ)
    return _answer(request, error_body(error, request_id(request)), error.http_status, headers)


def _answer(
    request: Request, body: ErrorBody, status: int, headers: dict[str, str] | None = None
) -> Response:
    content = error_json(body, open_inference=is_open_inference(request.scope["path"]))
    return Response(content, status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    body = ErrorBody(
        code=phrase.lower().replace(" ", "_"),
        message=f"{phrase}: {request.method} {quoted(request.url.path)}",
        request_id=request_id(request),
    )
    return _answer(request, body, error.status_code, dict(error.headers or {}))


async def _internal_error(request: Request, _: Exception) -> Response:
    return internal_error(request)


def internal_error(request: Request) -> Response:
    """The answer to a request that met a bug, of which it says nothing."""
    body = ErrorBody(code="internal", message="internal error", request_id=request_id(request))
    return _answer(request, body, 500)
