"""Whose a request is, by its head, and what that costs whom."""

from hashlib import sha256

import pytest
from prometheus_client import CollectorRegistry

from service.errors import InvalidRequest, Overloaded, RateLimited, Unauthenticated
from service.metrics.replica import Metrics
from service.security.access import Access
from service.security.keys import Key

MINE, HERS = b"m" * 40, b"h" * 40


@pytest.fixture
def metrics():
    return Metrics(CollectorRegistry())


@pytest.fixture
def access(metrics):
    opened = Access(metrics)
    opened.take([key("mine", MINE), key("hers", HERS, images_per_s=0.001, burst=4)])
    return opened


def key(name, secret, **limits):
    return Key(name=name, sha256=sha256(secret).hexdigest(), **limits)


def bearer(secret):
    return [(b"host", b"x"), (b"authorization", b"Bearer " + secret)]


def x_api_key(secret):
    return [(b"x-api-key", secret), (b"accept", b"*/*")]


async def test_both_headers_show_a_key(access):
    for headers in (
        bearer(MINE),
        x_api_key(MINE),
        [(b"authorization", b"  bEARER   " + MINE + b" ")],
        [(b"authorization", b"Basic abc"), *bearer(MINE)],
        [*bearer(HERS), *x_api_key(MINE)],  # the one is for us, the other for a proxy
    ):
        assert access.admit(headers).name == "mine"


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ([], 'Bearer realm="dat-serve"'),
        ([(b"authorization", b"Bearer")], 'Bearer realm="dat-serve"'),
        ([(b"authorization", b"Basic " + MINE)], 'Bearer realm="dat-serve"'),
        ([(b"authorization", MINE)], 'Bearer realm="dat-serve"'),
        (x_api_key(b""), 'error="invalid_token"'),
        (bearer(MINE[:-1]), 'error="invalid_token"'),
        (bearer(MINE + b"m"), 'error="invalid_token"'),
        ([*bearer(MINE), *x_api_key(b"n" * 40)], 'error="invalid_token"'),
        (2 * bearer(MINE), 'error="invalid_request"'),
        ([*x_api_key(MINE), *x_api_key(HERS)], 'error="invalid_request"'),
        (x_api_key(sha256(MINE).hexdigest().encode()), 'error="invalid_token"'),
    ],
)
async def test_nothing_else_does(access, metrics, headers, challenge):
    refused = access.admit(headers)
    assert isinstance(refused, Unauthenticated)
    assert challenge in refused.challenge
    assert MINE.decode() not in str(refused) + refused.challenge
    counted = {"key": "_none", "code": "unauthenticated"}
    assert metrics.registry.get_sample_value("dat_key_requests_refused_total", counted) == 1


async def test_without_a_key_file_everybody_may_ask(metrics):
    access = Access(metrics)
    with access.admit([]).spend(3):
        pass
    assert metrics.registry.get_sample_value("dat_key_images_total", {"key": "_none"}) == 3


async def test_a_limit_counts_images_and_only_those_that_were_taken_in(access, metrics):
    caller = access.admit(bearer(HERS))
    with caller.spend(2):
        pass
    with pytest.raises(Overloaded), caller.spend(2):
        raise Overloaded("the queue is full", 1.0)
    with pytest.raises(InvalidRequest), caller.spend(1):
        raise InvalidRequest("the client's own fault")
    with pytest.raises(RateLimited) as refused, caller.spend(2):
        pytest.fail("one is left")
    assert 900 < refused.value.retry_after_s <= 1000
    assert not isinstance(access.admit(bearer(HERS)), RateLimited)
    with caller.spend(1):
        pass
    assert isinstance(access.admit(bearer(HERS)), RateLimited)
    assert access.admit(bearer(MINE)).name == "mine"
    value = metrics.registry.get_sample_value
    assert value("dat_key_images_total", {"key": "hers"}) == 4
    refused = {"key": "hers", "code": "rate_limited"}
    assert value("dat_key_requests_refused_total", refused) == 2


async def test_a_new_file_revokes_and_keeps_what_was_used(access):
    with access.admit(bearer(HERS)).spend(4):
        access.take([key("hers", HERS, images_per_s=0.001, burst=4)])
    assert isinstance(access.admit(bearer(MINE)), Unauthenticated)
    assert isinstance(access.admit(bearer(HERS)), RateLimited)
    access.take([key("hers", HERS)])
    assert access.admit(bearer(HERS)).name == "hers"
    access.take([])
    assert isinstance(access.admit(bearer(HERS)), Unauthenticated)
