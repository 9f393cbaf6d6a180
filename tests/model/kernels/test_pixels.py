"""Bytes to the input of a network, against the modules on the CPU, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.detection import normalise as detection
from model.kernels.pixels import normalise, normalise_padded
from model.normalise import Normalise
from tests.model.kernels.conftest import DEVICE, DTYPES, generator, some_examples


def by_kernel(pixels, dtype):
    module = Normalise(dtype).to(DEVICE)
    return normalise(pixels.to(DEVICE), module.mean, module.std, dtype)


def padded_by_kernel(pixels, resized_sizes, dtype):
    module = detection.Normalise(dtype).to(DEVICE)
    return normalise_padded(
        pixels.to(DEVICE), resized_sizes.to(DEVICE), module.mean, module.inverse_std, dtype
    )


def check(ours, exact, dtype):
    """Compare with float32 values that are still to be rounded to `dtype`."""
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        # The interpreter does not round to bfloat16: it leaves out the lower bits.
        exact = (exact.view(torch.int32) >> 16 << 16).view(torch.float32)
    torch.testing.assert_close(ours.cpu(), exact.to(dtype), rtol=0, atol=0)


@pytest.fixture
def every_byte():
    """All 256 values in each channel, two images, `(2, 16, 32, 3)`."""
    byte = torch.arange(512) % 256
    first = torch.stack((byte, byte.flip(0), byte.roll(100)), -1).view(16, 32, 3)
    return torch.stack((first, first.flip(0))).to(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_every_channel(every_byte, dtype):
    check(by_kernel(every_byte, dtype), Normalise()(every_byte), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_of_every_channel_of_a_detector(every_byte, dtype):
    whole = torch.tensor([[16, 32], [16, 32]])
    exact = detection.Normalise()(every_byte, whole)
    check(padded_by_kernel(every_byte, whole, dtype), exact, dtype)


any_batch = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))


def draw_pixels(shape, seed):
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator(seed))


@given(shape=any_batch, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
@some_examples
def test_any_size(shape, dtype, seed):
    pixels = draw_pixels(shape, seed)
    check(by_kernel(pixels, dtype), Normalise()(pixels), dtype)


@given(
    shape=any_batch,
    resized=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_padding(shape, resized, dtype, seed):
    pixels, sizes = draw_pixels(shape, seed), torch.tensor(resized[: shape[0]])
    check(padded_by_kernel(pixels, sizes, dtype), detection.Normalise()(pixels, sizes), dtype)


@pytest.fixture
def used(monkeypatch):
    """The kernels are used wherever the device lets them be, interpreted ones too."""
    for module in ("model.normalise", "model.detection.normalise"):
        monkeypatch.setattr(f"{module}.usable", lambda pixels, dtypes: pixels.dtype in dtypes)


@pytest.mark.usefixtures("used")
def test_modules_take_bytes_in_any_order_of_memory():
    pixels = draw_pixels((2, 9, 7), 0).to(DEVICE)
    turned = pixels.transpose(1, 2).contiguous().transpose(1, 2)
    module = Normalise().to(DEVICE)
    check(module(turned), module(pixels).cpu(), torch.float32)
    detector, sizes = detection.Normalise().to(DEVICE), torch.tensor([[9, 7], [4, 5]])
    expected = detector(pixels, sizes.to(DEVICE)).cpu()
    check(detector(turned, sizes.to(DEVICE)), expected, torch.float32)
