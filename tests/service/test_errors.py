from collections.abc import Iterator

import pytest
from grpc import StatusCode

from service.errors import (
    HeadersTooLarge,
    ImageTooLarge,
    RequestTimeout,
    ServiceError,
    UnsupportedMediaType,
    UrlTooLong,
)

# google.rpc.Code's own HTTP mapping.
CANONICAL = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.NOT_FOUND: 404,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,
    StatusCode.INTERNAL: 500,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
# HTTP is more exact here than gRPC can be.
HTTP_HAS_ITS_OWN_WORD = {
    RequestTimeout: 408,
    ImageTooLarge: 413,
    UrlTooLong: 414,
    UnsupportedMediaType: 415,
    HeadersTooLarge: 431,
}


def all_errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for error in base.__subclasses__():
        yield error
        yield from all_errors(error)


@pytest.mark.parametrize("error", list(all_errors()), ids=lambda e: e.__name__)
def test_both_transports_tell_the_same_story(error):
    assert error.http_status == HTTP_HAS_ITS_OWN_WORD.get(error, CANONICAL[error.grpc_code])


def test_every_failure_has_a_code_of_its_own():
    codes = [error.code for error in all_errors()]
    assert len(set(codes)) == len(codes)
