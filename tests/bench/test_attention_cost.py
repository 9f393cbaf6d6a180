"""What the comparison of attentions measures, and what it compares with."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.attention_cost import PerQueryAttention, attentions, compare, measure_memory, tables
from model.attention import DeformableAttention, sample_features
from tests.conftest import SMALL_DAT

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MIB = 1 << 20
LARGE = 16 * MIB  # of which no allocator leaves a part in a block that is too large


@pytest.mark.parametrize("name", DEVICES)
def test_memory_is_the_most_at_one_time_and_what_is_held_at_the_end(name: str) -> None:
    device = torch.device(name)

    def forward() -> torch.Tensor:
        first = torch.empty(4 * LARGE, dtype=torch.uint8, device=device)
        second = torch.empty(2 * LARGE, dtype=torch.uint8, device=device)
        del first
        third = torch.empty(3 * LARGE, dtype=torch.uint8, device=device)
        del second
        return third

    memory = measure_memory(forward, device)

    assert (memory.peak, memory.held) == (6 * LARGE, 3 * LARGE)


@pytest.mark.parametrize("name", DEVICES)
def test_what_autograd_keeps_is_held(name: str) -> None:
    device = torch.device(name)
    ones = torch.ones(MIB // 4, device=device, requires_grad=True)

    recorded = measure_memory(lambda: ones.exp().sin().cos(), device)
    with torch.inference_mode():
        forgotten = measure_memory(lambda: ones.exp().sin().cos(), device)

    assert (recorded.peak, recorded.held) == (3 * MIB, 3 * MIB)
    assert (forgotten.peak, forgotten.held) == (2 * MIB, MIB)


def test_keys_of_each_query_are_those_of_dat_where_no_point_moves() -> None:
    torch.manual_seed(0)
    shared, literal = DeformableAttention(SMALL_DAT, 2), PerQueryAttention(SMALL_DAT, 2)
    shared.offset_proj.weight.data.zero_()
    for parameter in literal.offset_proj.parameters():
        parameter.data.zero_()
    for ours, theirs in (
        (literal.q, shared.q),
        (literal.kv, shared.kv),
        (literal.proj, shared.proj),
    ):
        ours.load_state_dict(theirs.state_dict())
    tokens, residual = torch.randn(2, 2, 8, 8, 64)

    with torch.inference_mode():
        attended = shared(tokens, residual).stream.sum()
        torch.testing.assert_close(literal(tokens, residual), attended)


def test_every_query_has_keys_of_its_own() -> None:
    torch.manual_seed(0)
    literal = PerQueryAttention(SMALL_DAT, 2)
    tokens = torch.randn(1, 8, 8, 64)
    groups, heads = literal.offset_groups, literal.heads

    with torch.inference_mode():
        together = literal(tokens, torch.zeros_like(tokens))[0].flatten(0, 1)
        for query in (0, 7, 20, 63):
            q = literal.q(tokens[0].flatten(0, 1)[query])
            moved = literal.reference_points + literal.offset_proj(q).view(groups, -1, 2)
            sampled = sample_features(tokens, moved[None, :, None])[0]
            keys, values = literal.kv(sampled).view(-1, 2, heads, 64 // heads).unbind(1)
            weights = torch.einsum("hd,khd->hk", q.view(heads, -1), keys).softmax(-1)
            attended = torch.einsum("hk,khd->hd", weights, values).flatten()
            torch.testing.assert_close(together[query], literal.proj(attended))


def test_flops_of_keys_of_each_query() -> None:
    literal = attentions(SMALL_DAT, 2)[-1]
    literal.module.to("meta")
    with FlopCounterMode(display=False) as operations, torch.inference_mode():
        literal.module(*torch.empty(2, 1, 8, 8, 64, device="meta"))
    sampled = 64 * 64 * 64  # queries, keys, channels
    assert literal.flops == operations.get_total_flops() // 2 + 4 * sampled


def test_contenders_have_the_parameters_of_their_modules() -> None:
    for contender in attentions(SMALL_DAT, 2):
        own = sum(parameter.numel() for parameter in contender.module.parameters())
        folded = 2 * 64 if contender.name == "DAT" else 0  # biases of keys and values
        assert contender.parameters == own + folded


def test_sharing_keys_saves_memory() -> None:
    torch.manual_seed(0)
    rows = compare(attentions(SMALL_DAT, 2), *torch.randn(2, 1, 8, 8, 64), rounds=1, seconds=0)
    dat, few, equal, literal = rows
    kept = 64 * 64 * 64 * 4  # bytes of one value for each query and key
    for row in rows:
        assert row["training_peak_bytes"] >= row["training_held_bytes"] > 0
    assert literal["inference_peak_bytes"] >= 3 * kept
    assert equal["inference_peak_bytes"] < literal["inference_peak_bytes"]
    assert dat["inference_peak_bytes"] < equal["inference_peak_bytes"]
    assert few["inference_peak_bytes"] < equal["inference_peak_bytes"]
    result = {"layers": [{"model": "m", "stage": 2, "map": [8, 8, 64], "rows": rows}]}
    assert "| m, stage 2, 8x8x64 | DAT |" in tables(result | {"models": rows})
