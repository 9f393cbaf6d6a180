"""Norms with the sum before them and the GELU after, against plain torch in float64."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.kernels.norm import add_norm, norm_activate
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples

SHAPES = st.tuples(
    st.sampled_from((1, 3)), *[st.sampled_from((1, 2, 7))] * 2, st.sampled_from((3, 24, 96, 100))
)


def make_norm(channels, dtype, seed=0):
    norm, random = nn.LayerNorm(channels), generator(seed)
    for parameter in norm.parameters():
        parameter.data = torch.randn(channels, generator=random)
    return norm.to(DEVICE, dtype).requires_grad_(False)


def maps(shape, dtype, seed, count=2):
    random = generator(seed)
    return [torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(count)]


def exact(norm, tokens):
    return deepcopy(norm).double()(tokens.double())


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
@some_examples
def test_a_sum_and_its_norm(shape, dtype, seed):
    norm, (tokens, branch) = make_norm(shape[-1], dtype, seed), maps(shape, dtype, seed)
    total, normed = add_norm(tokens, branch, norm)
    assert total.dtype == normed.dtype == dtype
    assert_close(total, tokens.double() + branch.double())
    assert_close(normed, exact(norm, tokens.double() + branch.double()))


@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    gelu=st.booleans(),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_a_norm_with_a_bias_before_it_and_a_gelu_after(*, shape, dtype, biased, gelu, seed):
    norm, (tokens,) = make_norm(shape[-1], dtype, seed), maps(shape, dtype, seed, 1)
    bias = maps(shape[-1:], dtype, seed + 1, 1)[0] if biased else None
    expected = exact(norm, tokens.double() if bias is None else tokens.double() + bias)
    actual = norm_activate(tokens, bias, norm, gelu=gelu)
    assert actual.dtype == dtype
    assert_close(actual, F.gelu(expected) if gelu else expected)


@pytest.mark.parametrize("channels", [32, 48, 512, 768, 1024, 1500])
def test_the_widths_of_models_and_more(channels):
    norm, (tokens, branch) = (
        make_norm(channels, torch.float32),
        maps((5, channels), torch.float32, 0),
    )
    assert_close(add_norm(tokens, branch, norm)[1], exact(norm, tokens.double() + branch.double()))
    total, normed = add_norm(tokens, None, norm)
    assert total is tokens
    assert_close(normed, exact(norm, tokens))


def test_tokens_far_from_zero_and_tokens_that_are_all_alike():
    """The deviation is that from the mean, not a difference of squares."""
    norm, (tokens,) = make_norm(96, torch.float32), maps((4, 96), torch.float32, 0, 1)
    assert_close(norm_activate(tokens + 1000, None, norm, gelu=False), exact(norm, tokens + 1000))
    alike = torch.full_like(tokens, 3.0)
    torch.testing.assert_close(
        norm_activate(alike, None, norm, gelu=False), norm.bias.expand_as(tokens)
    )


def test_what_is_no_number_stays_in_its_token():
    norm, (tokens, branch) = make_norm(24, torch.float32), maps((2, 3, 24), torch.float32, 0)
    branch[0, 1, 5] = torch.nan
    _, normed = add_norm(tokens, branch, norm)
    assert_close(normed, exact(norm, tokens.double() + branch.double()))
    assert normed.isnan().any(-1).tolist() == [[False, True, False], [False] * 3]
