"""What is answered to an error where the application does not answer?"""

from collections.abc import Sequence
from json import dumps

from prometheus_client import Counter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.errors import InvalidRequest, ServiceError
from service.metrics.replica import Metrics, Port
from service.transport import request_id as request_ids
from service.transport.http.connections.head import Header
from service.transport.http.error_forms import error_json, is_open_inference
from service.transport.http.schema import error_body, error_headers

# Answers are for the caller alone and for no page to show: OWASP's headers for an API.
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
_ID_HEADER = request_ids.HEADER.encode()
_ANY_ID = "0" * 32


class Refusals:
    """Writes and counts the answers to errors that the application does not see.

    Args:
        metrics: count them.
        port: as the metrics call it.
    """

    def __init__(self, metrics: Metrics, port: Port) -> None:
        self._port = port
        self._responses = metrics.responses
        self._answered: dict[int, Counter] = {}
        # Kept because a whole crowd may get the same.
        self._last = _Prepared(InvalidRequest(""), open_inference=False)

    def answer(
        self,
        error: ServiceError,
        url: bytes,
        headers: Sequence[Header],
        common: list[Header],
        *,
        last: bool,
        whole: bool,
    ) -> bytes:
        """The bytes of the answer to a request, which is counted.

        Args:
            error: that is answered.
            url: of the request, as far as it came.
            headers: of the request, as far as they came.
            common: the headers of all answers.
            last: whether the connection ends with the answer.
            whole: whether it has a body.
        """
        status = int(error.http_status)
        if status not in self._answered:
            self._answered[status] = self._responses.labels(self._port, str(status))
        self._answered[status].inc()
        given = b""
        for name, value in headers:
            if name == _ID_HEADER:
                given = value
        identity = request_ids.choose(given.decode("latin-1")).encode()
        open_inference = is_open_inference(url.decode("latin-1"))
        prepared = self._last
        if prepared.error is not error or prepared.open_inference is not open_inference:
            prepared = self._last = _Prepared(error, open_inference=open_inference)
        return prepared.answer(common, identity, last=last, whole=whole)


class _Prepared:
    """The answer to an error, prepared but for what differs from request to request.

    Attributes:
        error: that is answered.
        open_inference: whether it is answered in the form of that protocol, which has no id.
    """

    def __init__(self, error: ServiceError, *, open_inference: bool) -> None:
        self.error = error
        self.open_inference = open_inference
        body = error_json(error_body(error, _ANY_ID), open_inference=open_inference)
        self._before, self._after = body, b""
        if not open_inference:
            self._before, self._after = body.rsplit(_ANY_ID.encode(), 1)
        self._head = STATUS_LINE[int(error.http_status)] + _lines(_headers(error))

    def answer(self, common: list[Header], identity: bytes, *, last: bool, whole: bool) -> bytes:
        written = identity if identity.isalnum() else dumps(identity.decode())[1:-1].encode()
        body = self._before if self.open_inference else self._before + written + self._after
        return b"".join(
            (
                self._head,
                _lines(common),
                b"content-length: %d\r\n%s: %s\r\n" % (len(body), _ID_HEADER, identity),
                b"connection: close\r\n\r\n" if last else b"\r\n",
                body if whole else b"",
            )
        )


def unidentified(error: ServiceError, path: str) -> tuple[list[Header], bytes]:
    """The headers and the body of an answer to a request that was given no id."""
    body = error_json(
        error_body(error, request_ids.choose("")), open_inference=is_open_inference(path)
    )
    return [*_headers(error), (b"content-length", b"%d" % len(body))], body


def _headers(error: ServiceError) -> list[Header]:
    of_error = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    return [(b"content-type", b"application/json"), *SECURITY_HEADERS, *of_error]


def _lines(headers: list[Header]) -> bytes:
    return b"".join(name + b": " + value + b"\r\n" for name, value in headers)
