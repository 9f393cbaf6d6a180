"""Why kernels are not used, for each thing that they need."""

import mmap
import os
from types import SimpleNamespace

import pytest
import torch
from triton import TritonError

from model import kernels
from model.kernels import trial
from tests.model.kernels.conftest import DEVICE

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fit(monkeypatch, tmp_path):
    """A machine with all that kernels need, and nothing tried yet."""
    monkeypatch.setattr(kernels, "_tried", {})
    monkeypatch.setattr(kernels, "INSTALLED", True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(trial.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(trial, "add_one", lambda values: values + 1)
    monkeypatch.setattr(trial.torch, "arange", lambda end, device: torch.tensor([0.0, 1.0, 2.0]))


def usable():
    with torch.inference_mode():
        return kernels.usable(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=CUDA))


def test_nothing_is_in_the_way():
    assert kernels.why_not(CUDA) is None
    assert usable()


def test_a_cpu_has_none():
    assert kernels.why_not(torch.device("cpu")) == "cpu"


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(kernels, "enabled", False)
    assert kernels.why_not(CUDA) == "switched off"
    assert not usable()


def test_triton_may_be_missing(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "Triton is not installed" in kernels.why_not(CUDA)


def test_a_compiler_may_be_missing(monkeypatch):
    monkeypatch.setattr(kernels, "which", lambda name: None)
    assert "C compiler" in kernels.why_not(CUDA)
    monkeypatch.setattr(kernels, "which", lambda name: name if name == "/opt/cc" else None)
    assert "C compiler" in kernels.why_not(CUDA)
    monkeypatch.setenv("CC", "/opt/cc")
    assert kernels.why_not(CUDA) is None


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((12, 1), True)])
def test_a_gpu_may_be_too_old(monkeypatch, capability, fits):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    assert (kernels.why_not(CUDA) is None) == usable() == fits
    if not fits:
        assert "7.5" in kernels.why_not(CUDA)


def test_the_cache_may_be_closed(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(trial.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    assert "cannot be written" in kernels.why_not(CUDA)
    assert not usable()


def test_the_cache_may_be_where_nothing_is_executed(monkeypatch, tmp_path):
    def refused(*_, prot):
        assert prot & mmap.PROT_EXEC
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(trial.mmap, "mmap", refused)
    assert "noexec" in kernels.why_not(CUDA)
    assert not usable()


def test_a_cache_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert trial.cache_fault(folder) is None
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        TritonError("at 1:0: cannot\nbe compiled"),
        RuntimeError("Triton Error [CUDA]: no kernel image"),
        ImportError("cuda_utils.so: failed to map segment from shared object"),
    ],
)
def test_a_kernel_may_not_be_built(monkeypatch, error):
    tried = []

    def broken(values):
        tried.append(values)
        raise error

    monkeypatch.setattr(trial, "add_one", broken)
    for _ in range(2):
        assert str(error).partition("\n")[0] in kernels.why_not(CUDA)
        assert not usable()
    assert len(tried) == 1
    # Another device is another matter.
    monkeypatch.setattr(trial, "add_one", lambda values: values + 1)
    assert kernels.why_not(torch.device("cuda", 1)) is None


def test_a_kernel_may_give_wrong_sums(monkeypatch):
    monkeypatch.setattr(trial, "add_one", lambda values: values)
    assert "wrong" in kernels.why_not(CUDA)


def test_a_broken_device_is_not_taken_for_a_kernel_that_cannot_be_built(monkeypatch):
    def broken(values):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(trial, "add_one", broken)
    with pytest.raises(torch.AcceleratorError):
        kernels.why_not(CUDA)


@pytest.mark.parametrize("count", [1, 127, 128, 300])
def test_the_kernel_of_the_trial_adds_one(count, monkeypatch):
    monkeypatch.undo()
    values = torch.randn(count, device=DEVICE)
    torch.testing.assert_close(trial.add_one(values), values + 1)
    assert trial.fault(torch.device(DEVICE)) is None
