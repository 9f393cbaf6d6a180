"""What the comparison of attentions measures, and what it compares with."""

import pytest
import torch

from bench.attention_cost import MODELS, compare, measure_memory, tables
from model import create_model

MIB = 1 << 20
LARGE = 16 * MIB  # of which no allocator leaves a part in a block that is too large


def test_memory_is_the_most_at_one_time_and_what_is_held_at_the_end() -> None:
    def forward() -> torch.Tensor:
        first = torch.empty(4 * LARGE, dtype=torch.uint8)
        second = torch.empty(2 * LARGE, dtype=torch.uint8)
        del first
        third = torch.empty(3 * LARGE, dtype=torch.uint8)
        del second
        return third

    memory = measure_memory(forward)

    assert (memory.peak, memory.held) == (6 * LARGE, 3 * LARGE)


def test_what_autograd_keeps_is_held() -> None:
    ones = torch.ones(MIB // 4, requires_grad=True)

    recorded = measure_memory(lambda: ones.exp().sin().cos())
    with torch.inference_mode():
        forgotten = measure_memory(lambda: ones.exp().sin().cos())

    assert (recorded.peak, recorded.held) == (3 * MIB, 3 * MIB)
    assert (forgotten.peak, forgotten.held) == (2 * MIB, MIB)


@pytest.mark.slow
def test_sharing_keys_saves_memory() -> None:
    torch.manual_seed(0)
    networks = {name: create_model(name) for name in MODELS[::2]}
    rows = compare(networks, torch.randn(1, 3, 224, 224), rounds=1, seconds=0)
    dat, equal = rows
    for row in rows:
        assert row["training_peak_bytes"] >= row["training_held_bytes"] > 0
    assert dat["inference_peak_bytes"] < equal["inference_peak_bytes"]
    models = [row | {"parameters": 2e6, "flops": 3e9} for row in rows]
    assert "| dat_tiny_224 | 2.00 | 3.000 |" in tables({"models": models})
