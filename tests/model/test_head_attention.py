"""Softmax attention with a bias, by torch's own and by products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import attention
from model.attention import DeformableAttention
from model.fused import has_bfloat16
from model.head_attention import SHORT, attend, stores_logits
from model.local_attention import LocalAttention
from model.tracing import record, trace

ATOL = {torch.float32: 1e-5, torch.bfloat16: 0.03}


@settings(deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    st.integers(1, 70),
    st.sampled_from([1, 17, SHORT - 1, SHORT, 100]),
    st.booleans(),
)
@torch.inference_mode()
def test_it_is_the_softmax_of_products_and_bias(dtype, sizes, queries, keys, one_bias):
    images, tiles, heads = sizes
    torch.manual_seed(queries * keys)
    q = torch.randn(images * tiles, queries, heads, 8).to(dtype) * 8**-0.5
    k, v = torch.randn(2, images * tiles, keys, heads, 8).to(dtype)
    bias = torch.randn(1 if one_bias else tiles, heads, queries, keys)
    masked = torch.rand(bias.shape) < 0.2
    bias = bias.masked_fill(masked & ~masked.all(-1, keepdim=True), -torch.inf)

    attended = attend(q, k, v, bias)

    of_q, of_k, of_v = (part.double().transpose(1, 2) for part in (q, k, v))
    logits = of_q @ of_k.transpose(-1, -2)
    logits = logits.unflatten(0, (-1, len(bias))) + bias.to(dtype).double()
    expected = (logits.flatten(0, 1).softmax(-1) @ of_v).transpose(1, 2)
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=ATOL[dtype])


def test_in_bands_it_is_the_same_in_bfloat16(network, monkeypatch):
    network.cast(torch.bfloat16)
    images = torch.randn(2, 3, *network.config.image_size).bfloat16()
    with torch.inference_mode():
        whole = network.forward_explained(images)
        monkeypatch.setattr(attention, "BANDED_FROM", 0)
        monkeypatch.setattr(attention, "BAND", 1 << 12)
        banded = network.forward_explained(images)
        traced = trace(network, torch.zeros_like(images))(images)
    torch.testing.assert_close(banded.logits, whole.logits, rtol=0, atol=0.1)
    torch.testing.assert_close(traced, banded.logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_stored_in_bfloat16_alone(network, dtype):
    network.cast(dtype)
    images = torch.zeros(1, 3, *network.config.image_size, dtype=dtype)
    with torch.inference_mode():
        stored = stores_logits(images)
        called = {str(node.target) for node in record(network, images).nodes}
    assert stored == (dtype == torch.bfloat16 and has_bfloat16())
    # The attention of Deformable DETR has no logits.
    asks = any(
        isinstance(part, (DeformableAttention, LocalAttention)) for part in network.modules()
    )
    assert ("aten.bmm.default" in called) == (stored and asks)
