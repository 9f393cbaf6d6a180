"""Every way a request can fail, with the status each transport shows.

ServiceError
├── InvalidRequest        the request itself cannot be understood
│   ├── InvalidOption         an option is unknown or out of range
│   ├── NoImages              a request without an image
│   └── TooManyImages         more images than one request may hold
├── UnknownModel          this server has no model of that name
├── ModelControlOff       clients of this server may not load and unload models
├── ModelNotLoaded        a model cannot be loaded; what served before goes on
├── UnsupportedMediaType  this server does not read bodies of this media type (HTTP)
│   └── UnsupportedCoding     this server does not read bodies compressed in this way (HTTP)
├── InvalidImage          the bytes are not a usable image
│   └── ImageTooLarge         too many bytes or pixels
├── Unauthenticated       no API key, or one that is not known
├── CertificateRequired   the client has no certificate (HTTP)
├── RateLimited           the key may not ask for so much; retry later
├── Overloaded            too much is asked for at a time; retry later
├── DeadlineExceeded      the answer would come too late
├── Cancelled             the caller left
├── HeadersTooLarge       too many headers, or too many bytes in them (HTTP)
├── UrlTooLong            too many bytes in the URL (HTTP)
├── RequestTimeout        the caller sent its request too slowly (HTTP)
├── TooManyConnections    this replica has no connection left (HTTP)
├── NotReady              this replica is starting; retry elsewhere
│   └── Draining              this replica is leaving; retry elsewhere
├── EngineUnavailable     the device is lost, or the model fails again and again; retry elsewhere
│   └── WorkerLost            its process ended and is being started again
├── EngineFailed          our fault; the cause is in the log, not in the reply
│   └── OutOfMemory           the image needs more memory than there is
└── Internal              our fault as well, outside the device

The message of every class here is safe to show to a caller: it is short, and can be written in
UTF-8.
"""

from collections.abc import Iterator
from http import HTTPStatus
from typing import ClassVar, Literal

from grpc import StatusCode
from typing_extensions import override

Outcome = Literal["ok", "client_error", "rejected", "timeout", "cancelled", "server_error"]
BatchFailure = Literal["out_of_memory", "hung", "lost", "error"]
DecodeFailure = Literal[
    "empty", "unsupported", "truncated", "corrupt", "bad_base64", "too_large", "too_many_pixels"
]

_LONGEST_QUOTE = 200  # characters
# gRPC's clients take 8 kB of metadata, in which a byte that is not ASCII takes three.
_LONGEST_MESSAGE = 1000  # bytes


def quoted(value: object) -> str:
    """What a caller sent, to be named in a message: its `repr`, cut to 200 characters."""
    if isinstance(value, str | bytes):
        value = value[: _LONGEST_QUOTE + 1]  # before it is copied for the quotes
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 3]}..."


class ServiceError(Exception):
    """Base of all failures a caller may see.

    Args:
        message: what is wrong and what to do; cut to 1000 bytes.

    Attributes:
        code: the stable name of the failure that clients may match on.
        http_status: what HTTP shows.
        grpc_code: what gRPC shows.
        outcome: the label under which the request is counted.
        retry_after_s: when a retry may succeed, in seconds; `None` where a retry cannot help.
    """

    code: ClassVar[str]
    http_status: ClassVar[int]
    grpc_code: ClassVar[StatusCode]
    outcome: ClassVar[Outcome] = "client_error"
    retry_after_s: float | None = None

    def __init__(self, message: str) -> None:
        written = message.encode("utf-8", "replace")
        if len(written) > _LONGEST_MESSAGE:
            written = written[: _LONGEST_MESSAGE - 3] + b"..."
        super().__init__(written.decode("utf-8", "ignore"))


class InvalidRequest(ServiceError):
    """The request cannot be understood: malformed JSON, multipart or base64."""

    code = "invalid_request"
    http_status = HTTPStatus.BAD_REQUEST
    grpc_code = StatusCode.INVALID_ARGUMENT


class InvalidOption(InvalidRequest):
    """An option is unknown, repeated or out of range."""

    code = "invalid_option"


class NoImages(InvalidRequest):
    """The request holds no image."""

    code = "no_images"


class TooManyImages(InvalidRequest):
    """The request holds more images than one request may."""

    code = "too_many_images"


class UnknownModel(ServiceError):
    """This server has no model of that name."""

    code = "unknown_model"
    http_status = HTTPStatus.NOT_FOUND
    grpc_code = StatusCode.NOT_FOUND


class ModelControlOff(ServiceError):
    """Clients of this server may not load and unload models; a setting allows it."""

    code = "model_control_off"
    http_status = HTTPStatus.FORBIDDEN
    grpc_code = StatusCode.PERMISSION_DENIED


class ModelNotLoaded(ServiceError):
    """The model cannot be loaded; the version that served before goes on, if there is one."""

    code = "model_not_loaded"
    http_status = HTTPStatus.BAD_REQUEST
    grpc_code = StatusCode.FAILED_PRECONDITION


class UnsupportedMediaType(ServiceError):
    """This server does not read bodies of this media type (HTTP only)."""

    code = "unsupported_media_type"
    http_status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    grpc_code = StatusCode.INVALID_ARGUMENT


class UnsupportedCoding(UnsupportedMediaType):
    """This server does not read bodies that are compressed in this way (HTTP only)."""

    code = "unsupported_coding"


class InvalidImage(ServiceError):
    """The bytes are not a usable image.

    Attributes:
        reason: what is wrong with them, as counted.
    """

    code = "invalid_image"
    http_status = HTTPStatus.BAD_REQUEST
    grpc_code = StatusCode.INVALID_ARGUMENT

    def __init__(self, reason: DecodeFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ImageTooLarge(InvalidImage):
    """The image, or the request, has more bytes or pixels than allowed."""

    # HTTP has a status of its own for this, gRPC has none: so the two codes differ.
    code = "image_too_large"
    http_status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class Unauthenticated(ServiceError):
    """The request shows no API key, or one that this server does not know.

    Attributes:
        challenge: the header `WWW-Authenticate` of the answer (RFC 6750).
    """

    code = "unauthenticated"
    http_status = HTTPStatus.UNAUTHORIZED
    grpc_code = StatusCode.UNAUTHENTICATED

    def __init__(self, message: str, challenge: str) -> None:
        super().__init__(message)
        self.challenge = challenge


class CertificateRequired(ServiceError):
    """The client has shown no certificate, and only probes may do without (HTTP only)."""

    code = "certificate_required"
    http_status = HTTPStatus.FORBIDDEN
    grpc_code = StatusCode.PERMISSION_DENIED


class RateLimited(ServiceError):
    """The API key has asked for as many images as it may.

    Attributes:
        retry_after_s: the time after which it may ask for those of this request, seconds.
    """

    code = "rate_limited"
    http_status = HTTPStatus.TOO_MANY_REQUESTS
    grpc_code = StatusCode.RESOURCE_EXHAUSTED
    outcome = "rejected"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(ServiceError):
    """The queue is full, the answer would come too late, or too much is being received.

    Attributes:
        retry_after_s: the time in which the queue is expected to have room, in seconds.
    """

    code = "overloaded"
    http_status = HTTPStatus.TOO_MANY_REQUESTS
    grpc_code = StatusCode.RESOURCE_EXHAUSTED
    outcome = "rejected"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @override
    def __reduce__(self) -> tuple[type["Overloaded"], tuple[str, float | None]]:
        return Overloaded, (str(self), self.retry_after_s)  # how another process makes it again


class DeadlineExceeded(ServiceError):
    """The answer would come too late; the image was dropped."""

    code = "deadline_exceeded"
    http_status = HTTPStatus.GATEWAY_TIMEOUT
    grpc_code = StatusCode.DEADLINE_EXCEEDED
    outcome = "timeout"


class Cancelled(ServiceError):
    """The caller left before the answer, so that nobody reads this error."""

    code = "cancelled"
    http_status = 499  # nginx's word for it, and the canonical pair of CANCELLED
    grpc_code = StatusCode.CANCELLED
    outcome = "cancelled"


class HeadersTooLarge(ServiceError):
    """The request has too many headers, or too many bytes in them (HTTP only)."""

    code = "headers_too_large"
    http_status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    grpc_code = StatusCode.INVALID_ARGUMENT


class UrlTooLong(ServiceError):
    """The URL of the request has too many bytes (HTTP only)."""

    code = "url_too_long"
    http_status = HTTPStatus.REQUEST_URI_TOO_LONG
    grpc_code = StatusCode.INVALID_ARGUMENT


class RequestTimeout(ServiceError):
    """The caller sent its request too slowly (HTTP only)."""

    code = "request_timeout"
    http_status = HTTPStatus.REQUEST_TIMEOUT
    grpc_code = StatusCode.INVALID_ARGUMENT


class TooManyConnections(ServiceError):
    """This replica has no HTTP connection left; a few are kept for probes (HTTP only)."""

    code = "too_many_connections"
    http_status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_code = StatusCode.UNAVAILABLE
    outcome = "rejected"
    retry_after_s = 1.0


class NotReady(ServiceError):
    """This replica does not admit work yet."""

    code = "not_ready"
    http_status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_code = StatusCode.UNAVAILABLE
    outcome = "rejected"
    retry_after_s = 1.0


class Draining(NotReady):
    """This replica is leaving and admits no more work."""

    code = "draining"


class EngineUnavailable(ServiceError):
    """Nothing can run the model now: its devices are lost, or it fails again and again.

    Attributes:
        cause: as counted.
        retry_after_s: when this replica may have mended itself, seconds; another one may have
            an answer at once.
    """

    code = "engine_unavailable"
    http_status = HTTPStatus.SERVICE_UNAVAILABLE
    grpc_code = StatusCode.UNAVAILABLE
    outcome = "server_error"

    def __init__(
        self, message: str, cause: BatchFailure = "lost", retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after_s: float = retry_after_s

    def again(self) -> "EngineUnavailable":
        """A copy for another caller: an error keeps the frames that it passed through."""
        return EngineUnavailable(str(self), self.cause, self.retry_after_s)


class WorkerLost(EngineUnavailable):
    """The process that computed the image ended; another one is being started."""

    code = "worker_lost"

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(
            "the process of the device ended, and is being started again; try again, or ask "
            "another replica",
            "lost",
            retry_after_s,
        )

    @override
    def again(self) -> "WorkerLost":
        return WorkerLost(self.retry_after_s)


class EngineFailed(ServiceError):
    """The image failed on the device; the cause is only in the log."""

    code = "engine_failed"
    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    grpc_code = StatusCode.INTERNAL
    outcome = "server_error"


class OutOfMemory(EngineFailed):
    """The image alone needs more memory than the device has; a retry will fail as well."""

    code = "out_of_memory"


class Internal(ServiceError):
    """The server itself failed, not the device; the cause is only in the log."""

    code = "internal"
    http_status = HTTPStatus.INTERNAL_SERVER_ERROR
    grpc_code = StatusCode.INTERNAL
    outcome = "server_error"


def all_errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """Every failure under a class."""
    for error in base.__subclasses__():
        yield error
        yield from all_errors(error)
