"""What is limited in all is shared by the front ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.processes.front_end import share
from service.settings.limits import Limits
from service.settings.settings import Settings


@given(threads=st.integers(1, 64), front_ends=st.integers(1, 16))
def test_threads_that_decode_are_shared(threads: int, front_ends: int):
    """There are as many as said, if that is at least one for each."""
    settings = Settings(limits=Limits(decode_threads=threads))
    each = share(settings, front_ends).limits.decoders
    assert each >= 1
    assert max(threads, front_ends) - front_ends < each * front_ends <= max(threads, front_ends)


@pytest.mark.parametrize("front_ends", [1, 2, 7])
def test_one_front_end_can_take_the_largest_request(front_ends: int):
    limits = Settings().limits
    shared = share(Settings(), front_ends).limits
    assert limits.max_body_bytes <= shared.bytes_in_flight <= limits.bytes_in_flight
    assert limits.max_request_pixels <= shared.pixels_in_flight <= limits.pixels_in_flight
