"""Both sides of the comparison of kernels compute the same."""

import pytest
import torch

from bench import kernels
from bench.kernels import Rates, Step, attention_steps, block_steps, compare, end_steps, tables
from model import kernels as switch
from tests.conftest import SMALL_DAT
from tests.model.kernels.conftest import DEVICE, assert_close
from tests.model.kernels.test_layers import SMALL_DAT_PP

pytestmark = pytest.mark.slow

BESIDE_ATTENTION = {
    "dat": {"sum + norm", "linear + GELU"},
    "dat_pp": {"sum + norm", "sum + convolution + norm", "convolution + GELU"},
}


@pytest.mark.parametrize("config", [SMALL_DAT, SMALL_DAT_PP], ids=lambda config: config.name)
def test_the_plain_side_is_the_reference(config):
    torch.manual_seed(0)
    names = []
    with torch.inference_mode():
        for stage in range(len(config.stages)):
            for kind in (attention_steps, block_steps):
                for step in kind(config, stage, 1, torch.float32, DEVICE):
                    assert_close(step.fused(), step.plain().double())
                    names.append(step.name)
        for step in end_steps(config, 2, torch.float32, DEVICE):
            assert_close(step.fused(), step.plain().double())
    attention = {"sampling", "deformable attention", "local attention"}
    assert set(names) == attention | BESIDE_ATTENTION[config.family]


@pytest.mark.parametrize("config", [SMALL_DAT, SMALL_DAT_PP], ids=lambda config: config.name)
def test_attention_in_half_precision_is_near_its_reference(config):
    with torch.inference_mode():
        *_, step = attention_steps(config, 3, 2, torch.float16, DEVICE)
        assert step.name == "deformable attention"
        torch.testing.assert_close(step.fused(), step.plain(), rtol=0.02, atol=0.02)


def test_the_two_sides_of_a_layer_are_those_of_the_switch():
    step = Step.switched("switch", lambda: torch.tensor(float(switch.enabled)), torch.ones(3))
    assert (step.fused(), step.plain()) == (1, 0)
    assert step.moved == 4 * 4


def test_the_roofline_is_of_all_that_is_read_and_written():
    with torch.inference_mode():
        sampling, attention = attention_steps(SMALL_DAT_PP, 3, 2, torch.bfloat16, DEVICE)
        *_, whole = attention_steps(SMALL_DAT_PP, 3, 2, torch.float32, DEVICE)
    tokens, geometry = 2 * 3 * 4 * 128, 2 * 4 * 3 * 4 * 2 * 4
    assert sampling.moved == 3 * 2 * tokens + geometry
    # In half precision a table has a border, and four coefficients in a cell.
    assert attention.moved == 4 * 2 * tokens + geometry + 8 * 7 * 7 * 8
    assert whole.moved == 4 * 4 * tokens + geometry + 8 * 5 * 5 * 4
    assert attention.flops == 2 * 2 * tokens * 12
    assert Rates(bytes=1.0, flops=1e9).seconds(attention) == attention.moved
    assert Rates(bytes=1e9, flops=1.0).seconds(attention) == attention.flops


def test_the_report_has_a_row_for_every_step(monkeypatch):
    monkeypatch.setattr(kernels, "seconds", lambda call: 1e-6 * len(call().shape))
    rows = []
    with torch.inference_mode():
        for step in attention_steps(SMALL_DAT, 0, 1, torch.float32, DEVICE):
            where = {"model": "small", "image_size": [32, 64], "batch": 1, "stage": 0}
            rows.append(where | compare(step, Rates(bytes=1e12, flops=1e12)))
    assert rows
    table = tables({"steps": rows}).splitlines()
    assert len(table) == 2 + len(rows)
    assert all("| small | 32x64 | 1 | 0 |" in line for line in table[2:])
