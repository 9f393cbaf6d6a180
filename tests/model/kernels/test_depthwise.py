"""Depthwise convolutions with what is around them, against plain torch in float64."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model.fused import DepthwiseConv, tap_by_tap
from model.kernels import depthwise
from model.kernels.depthwise import convolve_gelu, convolve_sum_norm
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples
from tests.model.kernels.test_norm import exact, make_norm, maps

pytestmark = pytest.mark.slow

LAYERS = {
    "shape": st.tuples(
        st.sampled_from((1, 3)),
        *[st.sampled_from((1, 2, 7, 9))] * 2,
        st.sampled_from((3, 24, 96, 100)),
    ),
    "dtype": st.sampled_from(DTYPES),
    "laid_out": st.booleans(),
    "many": st.sampled_from((1, 1024)),  # strips are long, or short
    "seed": st.integers(0, 2**31),
}


def make_conv(channels, dtype, *, laid_out=True, seed=0):
    conv, random = DepthwiseConv(channels), generator(seed)
    weight = torch.randn(channels, 1, 3, 3, generator=random)
    conv.weight.data = tap_by_tap(weight) if laid_out else weight
    conv.bias.data = torch.randn(channels, generator=random)
    return conv.to(DEVICE, dtype).requires_grad_(False)


def convolved(conv, tokens):
    maps = tokens.double().permute(0, 3, 1, 2)
    return deepcopy(conv).double()(maps).permute(0, 2, 3, 1)


@given(**LAYERS)
@some_examples
def test_a_convolution_and_its_gelu(*, shape, dtype, laid_out, many, seed):
    conv = make_conv(shape[-1], dtype, laid_out=laid_out, seed=seed)
    (tokens,) = maps(shape, dtype, seed, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "MANY", many)
        active = convolve_gelu(tokens, conv)
    assert active.dtype == dtype
    assert_close(active, F.gelu(convolved(conv, tokens)))


@given(**LAYERS, branched=st.booleans())
@some_examples
def test_a_convolution_of_a_sum_and_its_norm(*, shape, dtype, laid_out, many, seed, branched):
    conv = make_conv(shape[-1], dtype, laid_out=laid_out, seed=seed)
    norm, (tokens, branch) = make_norm(shape[-1], dtype, seed), maps(shape, dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(depthwise, "MANY", many)
        ours, normed = convolve_sum_norm(tokens, branch if branched else None, conv, norm)
    total = tokens.double() + branch.double() if branched else tokens.double()
    expected = convolved(conv, total)
    assert ours.dtype == normed.dtype == dtype
    assert_close(ours, expected)
    assert_close(normed, exact(norm, expected))


@pytest.mark.parametrize("channels", [64, 384, 512, 1024])
def test_the_widths_of_models(channels):
    conv, norm = make_conv(channels, torch.float32), make_norm(channels, torch.float32)
    tokens, branch = maps((2, 3, 5, channels), torch.float32, 0)
    ours, normed = convolve_sum_norm(tokens, branch, conv, norm)
    expected = convolved(conv, tokens.double() + branch.double())
    assert_close(ours, expected)
    assert_close(normed, exact(norm, expected))
    assert_close(convolve_gelu(tokens, conv), F.gelu(convolved(conv, tokens)))


def test_what_is_no_number_reaches_its_neighbours_alone():
    conv, (tokens,) = make_conv(24, torch.float32), maps((2, 7, 9, 24), torch.float32, 0, 1)
    tokens[1, 0, 8, 5] = torch.nan
    active = convolve_gelu(tokens, conv)
    assert_close(active, F.gelu(convolved(conv, tokens)))
    assert active.isnan().nonzero().tolist() == [[1, y, x, 5] for y in (0, 1) for x in (7, 8)]


def test_the_gelu_of_every_number():
    """Where the weights are zero, it is that of the bias."""
    finite = torch.cat((torch.linspace(-12, 12, 5001), torch.tensor([-3e38, -1e6, 1e6, 3e38])))
    numbers = torch.cat((finite, torch.tensor([-torch.inf, torch.inf, torch.nan])))
    conv = make_conv(len(numbers), torch.float32)
    conv.weight.data.zero_()
    conv.bias.data.copy_(numbers)
    tokens = torch.zeros(1, 1, 1, len(numbers), device=DEVICE)
    with np.errstate(all="ignore"):
        active = convolve_gelu(tokens, conv).flatten().cpu()
    expected = F.gelu(numbers.double())
    assert expected.isfinite().sum() == len(finite)
    torch.testing.assert_close(active.double(), expected, rtol=1e-7, atol=6e-7, equal_nan=True)


def test_the_last_columns_of_an_image_do_not_see_the_next():
    conv, (tokens,) = make_conv(64, torch.float32), maps((3, 2, 5, 64), torch.float32, 0, 1)
    together = convolve_gelu(tokens, conv)
    for image, expected in zip(tokens, together, strict=True):
        torch.testing.assert_close(
            convolve_gelu(image.unsqueeze(0), conv)[0], expected, rtol=0, atol=0
        )


def test_kernels_are_laid_out_once():
    """A captured graph reads them where they are."""
    weight = torch.randn(24, 1, 3, 3)
    laid_out = tap_by_tap(weight)
    assert torch.equal(laid_out, weight)
    assert laid_out.permute(1, 2, 3, 0).is_contiguous()
    assert tap_by_tap(laid_out) is laid_out
