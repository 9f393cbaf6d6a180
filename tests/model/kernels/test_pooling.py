"""LayerNorm and mean in one, against the layers in float64."""

from copy import deepcopy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.kernels.pooling import normed_mean
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples


def drawn(shape, dtype, seed=0):
    random = generator(seed)
    norm = nn.LayerNorm(shape[-1])
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    # A token far from zero has a variance that is small beside its square.
    tokens = torch.randn(shape, generator=random) + 5 * torch.randn(*shape[:-1], 1)
    return tokens.to(DEVICE, dtype), norm.to(DEVICE).requires_grad_(False)


def check(tokens, norm):
    pooled = normed_mean(tokens, norm)
    assert pooled.dtype == torch.float32
    assert_close(pooled, deepcopy(norm).double()(tokens.double()).mean((1, 2)))


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 3, st.integers(2, 80)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_map(shape, dtype, seed):
    check(*drawn(shape, dtype, seed))


def test_the_last_map_of_the_largest_model():
    check(*drawn((1, 12, 12, 1024), torch.bfloat16))


def test_what_is_no_number_stays_in_its_image():
    tokens, norm = drawn((3, 5, 4, 24), torch.float32)
    tokens[1, 4, 3, 7] = torch.nan
    assert normed_mean(tokens, norm).isnan().all(1).tolist() == [False, True, False]
