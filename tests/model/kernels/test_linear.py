"""A linear layer and its GELU in one, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.fused import linear
from model.kernels import HALF
from model.kernels.linear import PROCESSORS, TILES, choose_tile, linear_gelu
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close, generator, some_examples


def check(shape, K, N, dtype, seed=0):
    random = generator(seed)
    tokens, weight, bias = (
        torch.randn(size, generator=random).to(DEVICE, dtype)
        for size in ((*shape, K), (N, K), (N,))
    )
    weight /= K**0.5
    active = linear_gelu(tokens, weight, bias)
    assert (active.shape, active.dtype) == ((*shape, N), dtype)
    product = torch.nn.functional.linear(tokens.double(), weight.double(), bias.double())
    assert_close(active, torch.nn.functional.gelu(product))


@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    K=st.integers(1, 200),
    N=st.integers(1, 100),
    dtype=st.sampled_from(HALF),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_layer(*, shape, K, N, dtype, seed):
    check(shape, K, N, dtype, seed)


# The first has more rows of tiles than go together, and one is left.
@pytest.mark.parametrize(
    ("M", "K", "N", "tile"),
    [(1100, 96, 130, 0), (100, 64, 180, 1), (100, 128, 100, 2), (49, 192, 90, 3)],
)
def test_every_tile(monkeypatch, M, K, N, tile):
    monkeypatch.setattr("model.kernels.linear.PROCESSORS", 3)
    assert choose_tile(M, N) == TILES[tile]
    check((M,), K, N, torch.bfloat16)


@given(M=st.integers(1, 10**6), N=st.integers(1, 4096))
def test_a_tile_is_the_largest_of_which_all_processors_get_one(M, N):
    def count(tile):
        return -(-M // tile.tokens) * -(-N // tile.outputs)

    enough = [tile for tile in TILES if count(tile) >= PROCESSORS]
    assert choose_tile(M, N) == (enough or TILES[-1:])[0]
    assert sorted(TILES, key=lambda tile: -tile.tokens * tile.outputs) == list(TILES)


def test_what_is_no_number_stays_in_its_row_and_column():
    """It comes right after the last channel of another row."""
    tokens = torch.ones(3, 40, dtype=torch.float16, device=DEVICE)
    weight, bias = tokens.new_ones(48, 40), tokens.new_zeros(48)
    tokens[1, 0] = weight[20, 0] = torch.nan
    broken = linear_gelu(tokens, weight, bias).isnan()
    assert broken[1].all()
    assert broken[:, 20].all()
    assert broken.sum() == 48 + 3 - 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_take_it_in_half_precision_alone(monkeypatch, dtype):
    """Their two steps would round in between."""
    monkeypatch.setattr("model.fused.usable", lambda tokens, dtypes: tokens.dtype in dtypes)
    tokens = torch.randn(20, 40, generator=generator()).to(DEVICE, dtype)
    layer = torch.nn.Linear(40, 60, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        plain = torch.nn.functional.gelu(layer(tokens))
        fused = linear_gelu(tokens, layer.weight, layer.bias) if dtype in HALF else plain
        assert (fused != plain).any() == (dtype in HALF)
        assert torch.equal(linear(layer, tokens, "gelu"), fused)
        torch.testing.assert_close(linear(layer, tokens), layer(tokens))
