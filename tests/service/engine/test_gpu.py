"""What is said of GPUs, as torch would describe them."""

from contextlib import nullcontext

import pytest
import structlog
import torch

from model import kernels
from service.engine import gpu

CUDA = torch.device("cuda", 1)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bfloat16_is_the_default_where_the_gpu_computes_it(monkeypatch, native, expected):
    looked_at = []

    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    monkeypatch.setattr("torch.cuda.device", lambda one: looked_at.append(one) or nullcontext())
    with structlog.testing.capture_logs() as lines:
        assert gpu.default_dtype(CUDA) == expected
    assert looked_at == [CUDA]
    assert [line["event"] for line in lines] == ([] if native else ["float16 by default"])
    assert gpu.default_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("reason", "enabled", "state", "warnings"),
    [
        (None, True, "on", []),
        ("switched off", False, "off: switched off", []),
        ("there is no C compiler", True, "off: there is no C compiler", ["there is no C compiler"]),
    ],
)
def test_kernels_that_are_off_are_a_warning_that_says_why(
    monkeypatch, reason, enabled, state, warnings
):
    monkeypatch.setattr(kernels, "why_not", lambda device: reason)
    monkeypatch.setattr(kernels, "enabled", enabled)
    with structlog.testing.capture_logs() as lines:
        assert gpu.kernels_on(CUDA) == state
    assert [line["reason"] for line in lines if line["log_level"] == "warning"] == warnings


def test_a_cpu_has_no_kernels_and_that_is_no_warning():
    with structlog.testing.capture_logs() as lines:
        assert gpu.kernels_on(torch.device("cpu")) == "off: cpu"
    assert not lines


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert gpu.describe(CUDA) == "GPU 1, compute capability 9.0"
    assert gpu.describe(torch.device("cpu")) == "cpu"


@pytest.mark.gpu
def test_a_gpu_describes_itself():
    device = torch.device("cuda", 0)
    assert "compute capability" in gpu.describe(device)
    assert gpu.default_dtype(device) in (torch.bfloat16, torch.float16)
    held = torch.zeros(1 << 24, device=device)
    assert gpu.reserved_bytes(device) >= held.nbytes
