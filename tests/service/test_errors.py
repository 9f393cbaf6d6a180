import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    HeadersTooLarge,
    ImageTooLarge,
    InvalidImage,
    Overloaded,
    RequestTimeout,
    UnknownModel,
    UnsupportedCoding,
    UnsupportedMediaType,
    UrlTooLong,
    all_errors,
    quoted,
)

# google.rpc.Code's own HTTP mapping.
CANONICAL = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.NOT_FOUND: 404,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
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
    UnsupportedCoding: 415,
    HeadersTooLarge: 431,
}


@pytest.mark.parametrize("error", list(all_errors()), ids=lambda e: e.__name__)
def test_both_transports_tell_the_same_story(error):
    assert error.http_status == HTTP_HAS_ITS_OWN_WORD.get(error, CANONICAL[error.grpc_code])


def test_every_failure_has_a_code_of_its_own():
    codes = [error.code for error in all_errors()]
    assert len(set(codes)) == len(codes)


@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.floats(),
        st.lists(st.text(), max_size=300),
        st.sampled_from(["x" * 10**6, "\ud800" * 500, b"\0" * 500, "\n" * 99]),
    )
)
def test_what_a_caller_sent_is_quoted_in_a_few_words(value):
    text = quoted(value)
    assert len(text) <= 200
    assert text == repr(value) or (text.endswith("...") and repr(value).startswith(text[:-3]))


@given(
    st.one_of(st.text(), st.sampled_from(["x" * 10**6, "ä" * 999, "\ud800x", "a\0b\nc"])),
    st.sampled_from(
        [UnknownModel, lambda m: InvalidImage("corrupt", m), lambda m: Overloaded(m, 1.0)]
    ),
)
def test_a_message_is_short_and_can_be_written(message, error):
    told = str(error(message))
    written = told.encode()
    assert len(written) <= 1000
    if len(message.encode("utf-8", "replace")) <= 1000:
        assert written == message.encode("utf-8", "replace")
    else:
        assert told.endswith("...")
