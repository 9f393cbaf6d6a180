"""Errors that the application does not see are in the form of the protocol as well."""

import json

import pytest

from tests.service.transport.http.test_connections import ask

POST = b"POST /v2/models/dat_nano/infer HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + b"Host: b\r\n\r\n", 400),
        (POST + b"X: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n", 400),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
        (b"GET /v2/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET /v2?" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    ],
)
def test_they_are_sentences(server, sent, status):
    (reply,) = ask(server, sent)
    assert reply.status == status
    body = json.loads(reply.body)
    assert list(body) == ["error"]
    assert isinstance(body["error"], str)
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        b"\r\n" * 50_000,
        b"GET /v20" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_those_without_a_path_of_the_protocol_are_as_all_others(server, sent):
    (reply,) = ask(server, sent)
    assert reply.code in ("invalid_request", "url_too_long", "headers_too_large")
